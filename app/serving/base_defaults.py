"""What a base's generation config says of answers: defaults below a manifest's and a request's own.

All fields of `transformers.GenerationConfig` are known here: those that a request may have too, those that
only a base has, and those that can't be honoured. The others don't change an answer (caches, outputs,
speculation), or are another's business: EOS ids are read at load, `do_sample` is each route's own matter.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from app.errors import InvalidRequest
from app.serving.parameters import DECLARED, Layer, check, parse_parameters
from app.strict_json import is_one_of
from app.validation import StrictModel

log = logging.getLogger("promptplex")

MAX_SEQUENCE = 64  # ids of a sequence that is banned or biased
_WHERE = "generation_config"

_AS_IN_REQUESTS = (*(name for name, each in DECLARED.items() if each.in_base), "stop_strings")
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {  # beside None
    **{
        name: ([] if each.default == () else each.default,) for name, each in DECLARED.items() if each.in_base
    },
    "min_new_tokens": (0,),
    "stop_strings": ([],),
    "min_length": (0,),
    "bad_words_ids": ([],),
    "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,),
}
# What can't be honoured, and the values that change nothing.
_NOT_HONOURED: Mapping[str, tuple[Any, ...]] = {
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "diversity_penalty": (0.0,),
    "penalty_alpha": (0.0,),
    "dola_layers": (),
    "constraints": ([],),
    "force_words_ids": ([],),
    "guidance_scale": (1.0,),
    "watermarking_config": (),
    "token_healing": (False,),
    "remove_invalid_values": (False,),
    "max_time": (),
}


def _pairs(value: Any) -> Any:
    return list(value.items()) if isinstance(value, Mapping) else value


def _listed(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


_ANY_SEQUENCE = Field(strict=False)  # lists too
_Whole = Annotated[int, Field(ge=0)]
_Positive = Annotated[float, Field(gt=0)]
_Ids = Annotated[tuple[_Whole, ...], Field(min_length=1, max_length=MAX_SEQUENCE, strict=False)]
_Bias = Annotated[tuple[_Ids, Annotated[float, Field(allow_inf_nan=True)]], _ANY_SEQUENCE]


class BaseRules(StrictModel, frozen=True):
    """What only a base says. Lengths count the ids that an answer goes on after too, as in `transformers`.

    These are the prompt's text, or what the decoder of an encoder-decoder begins with.
    """

    max_length: _Whole | None = None
    min_length: _Whole = 0
    bad_words_ids: Annotated[tuple[_Ids, ...], _ANY_SEQUENCE] = ()
    sequence_bias: Annotated[tuple[_Bias, ...], _ANY_SEQUENCE, BeforeValidator(_pairs)] = ()
    encoder_repetition_penalty: _Positive = 1.0
    encoder_no_repeat_ngram_size: _Whole = 0
    forced_bos_token_id: _Whole | None = None
    forced_eos_token_id: Annotated[_Ids, BeforeValidator(_listed)] = ()
    exponential_decay_length_penalty: Annotated[tuple[_Whole, _Positive], _ANY_SEQUENCE] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseDefaults:
    """A base's own defaults, as they are used."""

    parameters: Layer = field(default_factory=dict)
    rules: BaseRules = field(default_factory=BaseRules)
    shown: Mapping[str, Any] = field(default_factory=dict)  # what is used, by transformers' names, as JSON
    not_honoured: tuple[str, ...] = ()  # a line each


def base_defaults(values: Mapping[str, Any], *, max_rows: int) -> BaseDefaults:
    """Read the fields of a generation config, apart from those that are neutral or unset.

    Beams beyond the `max_rows` that run at once are left out.
    """
    given = {
        name: value
        for name, value in values.items()
        if value is not None and not is_one_of(value, _NEUTRAL.get(name, ()))
    }
    ignored = [
        f"{name} = {_short(given[name])} is not supported"
        for name, neutral in _NOT_HONOURED.items()
        if name in given and not is_one_of(given[name], neutral)
    ]
    parameters: dict[str, Any] = {}
    rules: dict[str, Any] = {}
    used = {*_AS_IN_REQUESTS, *BaseRules.model_fields}
    for name in [name for name in given if name in used]:
        try:
            if name in BaseRules.model_fields:
                rules[name] = getattr(check(BaseRules, {name: given[name]}, _WHERE), name)
            else:
                parameters |= _parameter(name, given[name], max_rows)
        except InvalidRequest as error:
            ignored.append(f"{name} = {_short(given.pop(name))} can't be used: {error}")
    return BaseDefaults(
        parameters=parameters,
        rules=BaseRules(**rules),
        shown={name: _as_json(value) for name, value in given.items() if name in used},
        not_honoured=tuple(ignored),
    )


def reported_defaults(values: Mapping[str, Any], *, max_rows: int) -> BaseDefaults:
    """Read them, and log what is used and what is not supported."""
    defaults = base_defaults(values, max_rows=max_rows)
    if defaults.shown:
        names = ", ".join(f"{name} {value}" for name, value in defaults.shown.items())
        log.info("the base's generation config gives defaults: %s", names[:1000])
    for line in defaults.not_honoured:
        log.warning("the base's generation config: %s", line)
    return defaults


def _parameter(name: str, value: Any, max_rows: int) -> dict[str, Any]:
    """Return a value that requests may set too, by the name that it has there."""
    if name == "stop_strings":
        name, value = "stop", [value] if isinstance(value, str) else value
    parsed = parse_parameters({name: value}, where=_WHERE)
    if name == "num_beams" and value > max_rows:
        raise InvalidRequest(
            f"each beam takes a row, and this server runs {max_rows} rows at once, so answers have no beams "
            "by default; raise max_rows"
        )
    return parsed


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _as_json(value: Any) -> Any:
    """Return the value as JSON, which has no infinity and only strings as keys."""
    if isinstance(value, Mapping):
        return [[list(ids), _as_json(bias)] for ids, bias in value.items()]
    if isinstance(value, list | tuple):
        return [_as_json(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
