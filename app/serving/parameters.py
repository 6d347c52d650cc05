"""Generation parameters: each declared once, with its bounds, default, description and other names.

Everything else is derived: the check, the fields of request bodies and their OpenAPI documents. What one
place sets (a request, the defaults of a task's manifest, the generation config of a base model) is a layer:
checked values by name. null means "not set".
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Annotated, Any, Self, TypeVar, get_type_hints

from pydantic import Field, GetPydanticSchema, ValidationError, create_model
from pydantic_core import core_schema

from app.errors import InvalidRequest
from app.request import SamplingChoices, SamplingParams, TokenRules, parameter
from app.serving.program_settings import MAX_PARAPHRASES, Effort
from app.validation import PLAIN, Must, StrictModel, message_of

DEFAULT_MAX_NEW_TOKENS = 128
MAX_NEW_TOKENS = 1_000_000
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_TOP_TOKENS = 20
SEED_BITS = 53  # a drawn seed survives JSON readers that have doubles only
_MAX_IDS = 1024

_CHOICES = tuple(each.name for each in fields(SamplingChoices))
_choices_of = attrgetter(*_CHOICES)

_Model = TypeVar("_Model", bound=StrictModel)
Layer = Mapping[str, Any]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS, strict=False)]  # tuples too
_Budget = Annotated[int, Field(ge=-1, le=MAX_NEW_TOKENS)]
_Token = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
_Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=_MAX_IDS, strict=False)]


def _unique(items: Any) -> GetPydanticSchema:
    """Check a list as `items`, and make a tuple of it that has each item once."""
    return GetPydanticSchema(
        lambda _, handler: core_schema.no_info_after_validator_function(
            lambda checked: tuple(dict.fromkeys(checked)), handler.generate_schema(items)
        )
    )


_Texts = Annotated[tuple[str, ...], _unique(Stops)]
_TokenIds = Annotated[tuple[int, ...], _unique(_Ids)]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationParameters(SamplingChoices):
    """The parameters of one generation, at their neutral values where no layer sets them."""

    max_new_tokens: int | None = parameter(
        None,
        "Tokens to generate, at most. Default: the task's, the base's, else 128, as far as positions last",
        ge=1,
        le=MAX_NEW_TOKENS,
        openai=False,
        in_base=True,
    )
    no_repeat_ngram_size: int = parameter(
        0, "No sequence of this many token ids occurs twice", ge=0, le=1024, in_base=True
    )
    bad_words: _Texts = parameter((), "Texts that are never generated")
    suppress_tokens: _TokenIds = parameter((), "Token ids that are never generated", in_base=True)
    begin_suppress_tokens: _TokenIds = parameter((), "Token ids that are never generated first", in_base=True)
    min_new_tokens: int | None = parameter(
        None,
        "Tokens to generate before EOS or a stop may end the answer; also called min_tokens. Default: 0",
        ge=0,
        le=MAX_NEW_TOKENS,
        also="min_tokens",
        in_base=True,
    )
    forced_bos_token: _Token | None = parameter(
        None,
        "Token that an encoder-decoder's answer begins with, as the vocabulary writes it, such as the target "
        "language of a translation. Default: the base's",
    )
    ignore_eos: bool = parameter(False, "Treat EOS as a token like any other", also="ignore_eos_token")
    seed: int | None = parameter(
        None, "Seed of sampling. Default: drawn at random, and reported", ge=0, le=2**63 - 1
    )
    stop: _Texts = parameter((), "Texts that end the answer; they aren't part of it", openai=False)
    stop_token_ids: _TokenIds = parameter((), "Token ids that end the answer, as EOS does")
    include_stop_str_in_output: bool = parameter(
        False, "Keep the stop string or stop id that ended the answer in its text"
    )
    skip_special_tokens: bool = parameter(True, "Leave special tokens out of the text")
    reasoning_effort: Effort | None = parameter(
        None,
        "How long a task with reasoning may think, by the budgets of its manifest; none: not at all",
        must="must be none, minimal, low, medium, high, xhigh or max",
    )
    thinking_token_budget: _Budget | None = parameter(
        None,
        "Maximum tokens before the answer of a task with reasoning; then its marker is put in. -1: no limit",
        must=f"must be a whole number from -1 to {MAX_NEW_TOKENS}",
    )
    include_reasoning: bool = parameter(True, "Report the steps before an answer")
    paraphrase: int | None = parameter(
        None,
        "Number of the task's paraphrase that renders the inputs, from 0 on. Default: its template",
        ge=0,
        le=MAX_PARAPHRASES - 1,
    )
    truncate: int | None = parameter(
        None,
        "Keep this many tokens of the inputs, the last ones; of an encoder-decoder, the first ones, so that "
        "there are this many with template and EOS. Default: all",
        ge=1,
        le=1_000_000,
        openai=False,
    )
    return_full_text: bool = parameter(False, "Put the rendered prompt before the answer", openai=False)
    top_n_tokens: int = parameter(
        0,
        "Also report this many of the most probable tokens beside each generated one",
        ge=0,
        le=MAX_TOP_TOKENS,
        openai=False,
    )
    decoder_input_details: bool = parameter(
        False,
        "Also report the prompt's tokens and their log-probabilities; of an encoder-decoder, with what its "
        "decoder begins",
        openai=False,
    )

    @classmethod
    def of(cls, *layers: Layer) -> Self:
        """Resolve layers, the lowest first: what a later one sets counts."""
        return cls(**{name: value for layer in layers for name, value in layer.items()})

    def sampling(
        self, seed: int, *, logit_bias: tuple[tuple[int, float], ...] = (), rules: TokenRules | None = None
    ) -> SamplingParams:
        """Return the engine's part; `seed` is used where none was set."""
        return SamplingParams(
            seed=seed if self.seed is None else self.seed,
            logit_bias=logit_bias,
            rules=rules,
            **dict(zip(_CHOICES, _choices_of(self), strict=True)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Declaration:
    """A declared parameter, as checks, bodies and documents need it."""

    type: Any
    default: Any
    description: str
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    hint: str = ""  # goes on after what a value must be
    must: str = ""  # what a value must be, where its bounds don't say it
    also: str | None = None  # another name for it
    same: Mapping[Any, Any] = field(default_factory=dict)  # values that others have for one of ours
    openai: bool = True  # the bodies of OpenAI's routes have it under this name
    in_base: bool = False  # generation configs of base models have it under this name

    def model_field(self, **changes: Any) -> tuple[Any, Any]:
        """Return type and field for `pydantic.create_model`; `changes` are arguments of `pydantic.Field`."""
        bounds = {"ge": self.ge, "gt": self.gt, "le": self.le} | changes
        description = bounds.pop("description", self.description)
        if self.default is not None:
            description += f". Default: {_shown(self.default)}{'' if self.le is None else ' (no effect)'}"
        kind = self.type | None
        if self.type is bool or self.must:
            kind = Annotated[kind, Must(self.must or "must be true or false")]
        elif self.le is not None:
            kind = Annotated[kind, Field(**bounds), Must(_numbers(self.type is float, **bounds) + self.hint)]
        return kind, Field(None, description=description)


def _shown(value: Any) -> str:
    return "none" if value == () else json.dumps(value).removesuffix(".0")


def _numbers(is_float: bool, *, ge: float | None, gt: float | None, le: float) -> str:
    low, high = map(_shown, (ge if gt is None else gt, le))
    span = f"from {low} to {high}" if gt is None else f"above {low}, at most {high}"
    return f"must be a {'' if is_float else 'whole '}number {span}"


_TYPES = get_type_hints(GenerationParameters, include_extras=True)
DECLARED: Mapping[str, Declaration] = {
    each.name: Declaration(type=_TYPES[each.name], default=each.default, **each.metadata)
    for each in fields(GenerationParameters)
}
_FIELDS: dict[str, Any] = {name: each.model_field() for name, each in DECLARED.items()}
_LAYER = create_model("Layer", __base__=StrictModel, **_FIELDS)


def parse_parameters(values: Layer, *, where: str = "parameters") -> dict[str, Any]:
    """Check names, types and bounds, and return what is set.

    Raise InvalidRequest that names the first field at fault, under `where`.
    """
    return {name: value for name, value in check(_LAYER, values, where) if value is not None}


def check(model: type[_Model], values: Mapping[str, Any], where: str) -> _Model:
    """Check an object's fields; null is the same as none.

    Raise InvalidRequest that names the first field at fault, such as `task.choices[0]`.
    """
    unknown = sorted(str(name)[:64] for name in values if name not in model.model_fields)
    if unknown:
        raise InvalidRequest(
            f"{where} has no field {', '.join(unknown[:16])}; it knows {', '.join(model.model_fields)}.",
            param=f"{where}.{unknown[0]}",
        )
    try:
        return model.model_validate({name: value for name, value in values.items() if value is not None})
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
    kind, message = problem["type"], message_of(problem)
    place = [part for part in problem["loc"] if part != "[key]"]  # of an object's name itself
    if kind in ("missing", "extra_forbidden"):
        name = place.pop()
        message = f"must have the field {name}" if kind == "missing" else f"has no field {str(name)[:64]}"
    param = where + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    link = " " if kind in (PLAIN, "missing", "extra_forbidden") else ": "
    raise InvalidRequest(f"{param}{link}{message}.", param=param)
