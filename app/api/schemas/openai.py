"""Bodies of the OpenAI API. Unknown fields are refused, unsupported ones accepted at neutral values."""

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

from app.api.schemas.client_defaults import OF_CHATS, OF_COMPLETIONS, without_client_defaults
from app.api.schemas.generate import Reference, User, VoteBody
from app.api.schemas.messages import ChatMessage
from app.api.schemas.neutral import Neutral
from app.api.schemas.parameters import OTHER_NAMES, ParametersBody, with_parameters
from app.api.schemas.response_format import ResponseFormat, StructuredOutputs
from app.errors import InvalidRequest
from app.request import MIN_TEMPERATURE
from app.serving.parameters import MAX_NEW_TOKENS, MAX_TOP_TOKENS, Stop, Stops
from app.serving.structured_output.constraints import Constraint
from app.validation import PLAIN, StrictModel, wrong

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
    lambda each: each.openai,
    temperature={"ge": 0, "description": "Divides the logits before sampling; 0 is greedy decoding"},
)
class _OpenAi(ParametersBody):
    """The fields that completions and chats share."""

    _client_defaults: ClassVar[Mapping[str, tuple[Any, ...]]]

    model: Reference = Field(
        description="Name of the base model, or a task: task, task@alias, task@3 or task@sha256:<digest>"
    )
    max_tokens: int | None = Field(
        None, ge=1, le=MAX_NEW_TOKENS, description="Tokens to generate, at most. Default: as for /generate"
    )
    n: int | None = Field(None, ge=1, le=MAX_N, description="Answers to each prompt. Default: 1")
    stop: Stop | Stops | None = Field(
        None, description="Texts that end the answer; they aren't part of it. Default: none"
    )
    logit_bias: LogitBias | None = Field(
        None, description="Added to the logits of tokens, by token id; -100 excludes a token"
    )
    response_format: ResponseFormat | None = None
    user: User | None = None
    stream: bool | None = Field(None, description="Answer with server-sent events. Default: false")
    stream_options: "StreamOptions | None" = None
    metadata: dict[str, str] | None = Field(None, description="Accepted and ignored")

    # Beyond the OpenAI API, as in vLLM and others.
    structured_outputs: StructuredOutputs | None = None
    vote: VoteBody | None = Field(
        None, description="Sample several answers; the most frequent one wins. Default: as the task says"
    )

    # Tools are not supported; they are accepted where tool_choice says that none may be called.
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
    def _without_client_defaults(cls, data: Any) -> Any:
        return without_client_defaults(data, cls._client_defaults, {**cls.model_fields, **OTHER_NAMES})

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
        """Return what the answer must match."""
        if self.structured_outputs is not None:
            return self.structured_outputs.constraint()
        return None if self.response_format is None else self.response_format.constraint("response_format")

    def bias(self) -> tuple[tuple[int, float], ...]:
        """Return pairs of a token id and the number to add to its logit."""
        return tuple((int(id_), bias) for id_, bias in (self.logit_bias or {}).items())

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def wants_usage_so_far(self) -> bool:
        """Whether every chunk of a stream has the usage so far."""
        return self.wants_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    @property
    @abstractmethod
    def num_top(self) -> int | None:
        """How many of the most probable tokens to report."""

    @property
    def scores_prompt(self) -> bool:
        """Whether to report log-probabilities of the prompt."""
        return False

    @property
    def num_candidates(self) -> int | None:
        """How many answers to choose from; None: all that are generated are returned."""
        return None

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


class StreamOptions(StrictModel):
    """What a stream reports besides text."""

    include_usage: bool | None = Field(None, description="Report the usage in a last chunk")
    continuous_usage_stats: bool | None = Field(
        None, description="Report the usage so far in every chunk; needs include_usage"
    )
    include_obfuscation: bool | None = None


def _prompt_tag(value: Any) -> str | None:
    """Choose by the first element of a list; the others must be like it."""
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(value, str):
        return "<text>"
    return {str: "<texts>", int: "<ids>", list: "<lists>"}.get(type(first))


# With plain alternatives, an error would be reported for each.
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
    """Prompts to complete, and how."""

    _client_defaults = OF_COMPLETIONS

    prompt: Prompt
    logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_TOP_TOKENS,
        description="Report log-probabilities, and this many of the most probable tokens. Default: none",
    )
    echo: bool | None = Field(None, description="Put the prompt before the completion. Default: false")
    max_tokens: int | None = Field(
        None,
        ge=0,
        le=MAX_NEW_TOKENS,
        description="Tokens to generate, at most; 0 only scores the prompt. Default: as for /generate",
    )
    best_of: int | None = Field(
        None,
        ge=1,
        le=MAX_N,
        description="Generate this many answers to each prompt, and return the n with the highest "
        "log-probability per token. Default: n",
    )

    @model_validator(mode="after")
    def _best_of_more(self) -> Self:
        best_of, count = self.best_of, self.n or 1
        if best_of is not None and best_of < count:
            raise InvalidRequest(
                f"best_of ({best_of}) must be at least n ({count}), which it chooses from.", param="best_of"
            )
        if best_of not in (None, count) and self.stream:
            raise InvalidRequest(
                "best_of chooses when all answers are there, so it can't be streamed; leave out one of them.",
                param="best_of",
            )
        return self

    @property
    def num_candidates(self) -> int | None:
        """How many answers to choose from; None: all that are generated are returned."""
        return self.best_of if self.best_of != (self.n or 1) else None

    @property
    def num_top(self) -> int | None:
        """How many of the most probable tokens to report; 0: only the generated ones."""
        return self.logprobs

    @property
    def scores_prompt(self) -> bool:
        """Whether to report log-probabilities of the prompt: where it is echoed."""
        return bool(self.echo) and self.logprobs is not None

    @property
    def prompts(self) -> list[str | tuple[int, ...]]:
        """The prompts, each text or token ids."""
        given: list[Any] = self.prompt if isinstance(self.prompt, list) else [self.prompt]
        prompts = [given] if isinstance(given[0], int) else given
        return [prompt if isinstance(prompt, str) else tuple(prompt) for prompt in prompts]


class ChatRequest(_OpenAi):
    """A chat to answer, and how."""

    _client_defaults = OF_CHATS

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(
        None, ge=1, le=MAX_NEW_TOKENS, description="Another name for max_tokens"
    )
    logprobs: bool | None = Field(None, description="Report log-probabilities. Default: false")
    top_logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_TOP_TOKENS,
        description="Report this many of the most probable tokens; needs logprobs",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs go with logprobs: true only")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise ValueError("max_tokens and max_completion_tokens mean the same; send one of them")
        return self

    @property
    def num_top(self) -> int | None:
        """How many of the most probable tokens to report."""
        return self.top_logprobs

    def _max_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens
