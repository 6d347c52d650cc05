"""Bodies of the OpenAI routes. Unknown fields are refused; habits are taken where they change nothing."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from app.api.schemas.bodies import Body
from app.api.schemas.client_defaults import OF_CHATS, OF_COMPLETIONS, without_habits
from app.api.schemas.generate import Reference
from app.api.schemas.messages import ChatMessage
from app.api.schemas.neutral import Neutral
from app.api.schemas.parameters import OTHER_NAMES, ParametersBody, with_parameters
from app.api.schemas.response_format import ResponseFormat, StructuredOutputs
from app.errors import InvalidRequest
from app.request import MIN_TEMPERATURE
from app.serving.parameters import MAX_NEW_TOKENS, MAX_TOP_TOKENS, Stop, Stops
from app.serving.structured_output.constraints import Constraint
from app.validation import PLAIN, wrong

MAX_N = 16
MAX_PROMPTS = 64
MAX_MESSAGES = 1024
MAX_PROMPT_IDS = 1_000_000
MAX_BIASES = 300

TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=MAX_PROMPT_IDS)]
LogitBias = Annotated[
    dict[Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=MAX_BIASES),
]


_INSTEAD_OF_TOOLS = (
    "leave it out. For arguments as JSON, send their schema as response_format "
    '{"type": "json_schema", "json_schema": {"name": ..., "schema": ...}}'
)


@with_parameters(
    lambda each: each.openai, temperature={"ge": 0, "description": "Divides the logits; 0 is greedy decoding"}
)
class _OpenAi(ParametersBody):
    """What completions and chats have in common."""

    _habits: ClassVar[Mapping[str, tuple[Any, ...]]]

    model: Reference
    max_tokens: int | None = Field(None, ge=1, le=MAX_NEW_TOKENS)
    n: int | None = Field(None, ge=1, le=MAX_N)
    stop: Stop | Stops | None = None
    logit_bias: LogitBias | None = Field(
        None, description="Added to the logits of tokens, by id; -100 rules a token out"
    )
    response_format: ResponseFormat | None = None
    user: Annotated[str, Field(max_length=256)] | None = None
    stream: bool | None = None
    stream_options: "StreamOptions | None" = None
    metadata: dict[str, str] | None = Field(None, description="Taken, and left alone")

    # Beyond OpenAI's own, as vLLM and others have them.
    structured_outputs: StructuredOutputs | None = None

    # Nothing calls tools; those that must not be called anyway are taken.
    tool_choice: Annotated[Any, Neutral("none", "auto", instead=_INSTEAD_OF_TOOLS)] = None
    tools: list[dict[str, Any]] | None = None
    parallel_tool_calls: bool | None = None
    function_call: Annotated[Any, Neutral("none", "auto", instead=_INSTEAD_OF_TOOLS)] = None
    functions: list[dict[str, Any]] | None = None

    @field_validator("tools", "functions")
    @classmethod
    def _not_to_be_called(cls, given: list[Any] | None, info: ValidationInfo) -> list[Any] | None:
        choice = info.data.get("tool_choice" if info.field_name == "tools" else "function_call")
        if given and choice != "none":
            raise wrong(f"is not supported; {_INSTEAD_OF_TOOLS}")
        return given

    @model_validator(mode="before")
    @classmethod
    def _without_habits(cls, data: Any) -> Any:
        return without_habits(data, cls._habits, {**cls.model_fields, **OTHER_NAMES})

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options go with stream only")
        return self

    @model_validator(mode="after")
    def _one_constraint(self) -> Self:
        formatted = self.response_format is not None and self.response_format.type != "text"
        if formatted and self.structured_outputs is not None:
            raise ValueError("response_format and structured_outputs both say what the answer is; send one")
        return self

    def constraint(self) -> Constraint | None:
        """What the answer must be."""
        if self.structured_outputs is not None:
            return self.structured_outputs.constraint()
        return None if self.response_format is None else self.response_format.constraint("response_format")

    def bias(self) -> tuple[tuple[int, float], ...]:
        """What is added to the logits of which ids."""
        return tuple((int(id_), bias) for id_, bias in (self.logit_bias or {}).items())

    @property
    def wants_usage(self) -> bool:
        """Whether a stream is to end with its usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def wants_usage_so_far(self) -> bool:
        """Whether every chunk of a stream is to have its usage."""
        return self.wants_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    @property
    @abstractmethod
    def num_top(self) -> int | None:
        """Most probable tokens to report."""

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of the prompt are asked for."""
        return False

    def generation(self) -> dict[str, Any]:
        """Return the generation parameters that are set, by our names."""
        given = self.given()
        if "temperature" in given:
            given["do_sample"] = given["temperature"] >= MIN_TEMPERATURE
            if not given["do_sample"]:
                del given["temperature"]
        ours = {
            "max_new_tokens": self._max_tokens(),
            "stop": (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()) or None,
            "top_n_tokens": self.num_top,
            "decoder_input_details": self.scores_prompt or None,
        }
        return given | {name: value for name, value in ours.items() if value is not None}

    def _max_tokens(self) -> int | None:
        return self.max_tokens


class StreamOptions(Body):
    """What else a stream tells."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = Field(
        None, description="With include_usage: every chunk has the usage so far"
    )
    include_obfuscation: bool | None = None


def _prompt_tag(value: Any) -> str | None:
    """By the first element of a list; the others must be like it."""
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(value, str):
        return "<text>"
    return {str: "<texts>", int: "<ids>", list: "<lists>"}.get(type(first))


# With plain alternatives, an error would be told of each.
Prompt = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[TokenIds, Tag("<ids>")]
    | Annotated[list[str], Field(max_length=MAX_PROMPTS), Tag("<texts>")]
    | Annotated[list[TokenIds], Field(max_length=MAX_PROMPTS), Tag("<lists>")],
    Discriminator(
        _prompt_tag,
        custom_error_type=PLAIN,
        custom_error_message="must be a text or a list of token ids, or a list of texts or of such lists, "
        "with at least one element",
    ),
]


class CompletionRequest(_OpenAi):
    """`POST /v1/completions`."""

    _habits = OF_COMPLETIONS

    prompt: Prompt
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_TOKENS)
    echo: bool | None = None
    max_tokens: int | None = Field(
        None, ge=0, le=MAX_NEW_TOKENS, description="0: nothing is generated, so that echo only scores"
    )
    best_of: int | None = Field(None, ge=1, le=MAX_N, description="As many as n")

    @model_validator(mode="after")
    def _best_of_none(self) -> Self:
        if self.best_of not in (None, self.n or 1):
            raise InvalidRequest(
                "best_of is not supported; leave it out, or send the value of n.", param="best_of"
            )
        return self

    @property
    def num_top(self) -> int | None:
        """`logprobs: 0` asks for the generated tokens' only."""
        return self.logprobs

    @property
    def scores_prompt(self) -> bool:
        """An echoed prompt has its log-probabilities too."""
        return bool(self.echo) and self.logprobs is not None

    @property
    def prompts(self) -> list[str | tuple[int, ...]]:
        """Each prompt: text, or token ids."""
        given: list[Any] = self.prompt if isinstance(self.prompt, list) else [self.prompt]
        prompts = [given] if isinstance(given[0], int) else given
        return [prompt if isinstance(prompt, str) else tuple(prompt) for prompt in prompts]


class ChatRequest(_OpenAi):
    """`POST /v1/chat/completions`."""

    _habits = OF_CHATS

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_NEW_TOKENS)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_TOKENS)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs go with logprobs: true only")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise ValueError("max_tokens and max_completion_tokens mean the same; send one of them")
        return self

    @property
    def num_top(self) -> int | None:
        """As many as `top_logprobs` says."""
        return self.top_logprobs

    def _max_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens
