"""Bodies of `/v1/completions` and `/v1/chat/completions`."""

from typing import Annotated, Any, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from app.api.schemas.client_defaults import OF_CHATS, OF_COMPLETIONS
from app.api.schemas.messages import MAX_MESSAGES, ChatMessage
from app.api.schemas.neutral import Neutral
from app.api.schemas.openai_body import INSTEAD_OF_TOOLS, OpenAiBody, ReasoningBody, uncallable
from app.api.schemas.response_format import ResponseFormat
from app.errors import InvalidRequest
from app.serving.parameters import MAX_NEW_TOKENS, MAX_TOP_TOKENS
from app.serving.program_settings import Effort
from app.validation import PLAIN, StrictModel

MAX_N = 16
MAX_PROMPTS = 64
MAX_PROMPT_IDS = 1_000_000

TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=MAX_PROMPT_IDS)]


class ReasoningOptions(ReasoningBody):
    """How long a task with reasoning may think, in OpenRouter's form."""

    effort: Effort | None = Field(None, description="The same as reasoning_effort")
    max_tokens: int | None = Field(
        None, ge=0, le=MAX_NEW_TOKENS, description="The same as thinking_token_budget"
    )
    exclude: bool | None = Field(None, description="The opposite of include_reasoning")
    enabled: bool | None = Field(None, description="false: the same as the effort none")

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.enabled is False and (self.max_tokens or self.effort not in (None, "none")):
            raise ValueError(
                "enabled false means that there is no reasoning; leave out effort and max_tokens"
            )
        return self

    def parameters(self) -> dict[str, Any]:
        """Return generation parameters by our names."""
        given = {
            "reasoning_effort": "none" if self.enabled is False else self.effort,
            "thinking_token_budget": self.max_tokens,
            "include_reasoning": None if self.exclude is None else not self.exclude,
        }
        return {name: value for name, value in given.items() if value is not None}


class _Completing(OpenAiBody):
    """The fields that completions and chats share."""

    _format_field = "response_format"

    max_tokens: int | None = Field(
        None, ge=1, le=MAX_NEW_TOKENS, description="Tokens to generate, at most. Default: as for /generate"
    )
    n: int | None = Field(None, ge=1, le=MAX_N, description="Answers to each prompt. Default: 1")
    response_format: ResponseFormat | None = None
    stream_options: "StreamOptions | None" = None
    reasoning: ReasoningOptions | None = None

    function_call: Annotated[Any, Neutral("none", "auto", instead=INSTEAD_OF_TOOLS)] = None
    functions: list[dict[str, Any]] | None = None
    _uncallable_functions = field_validator("functions")(uncallable)

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options go with stream only")
        return self

    @property
    def format(self) -> ResponseFormat | None:
        """What the answer must match."""
        return self.response_format

    @property
    def thinking(self) -> ReasoningOptions | None:
        """How long a task with reasoning may think."""
        return self.reasoning

    @property
    def num_answers(self) -> int:
        """How many answers each prompt gets."""
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def wants_usage_so_far(self) -> bool:
        """Whether every chunk of a stream has the usage so far."""
        return self.wants_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    @property
    def limit(self) -> int | None:
        """How many tokens may be generated."""
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


class CompletionRequest(_Completing):
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
        best_of, count = self.best_of, self.num_answers
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
        return self.best_of if self.best_of != self.num_answers else None

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


class ChatRequest(_Completing):
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

    @property
    def limit(self) -> int | None:
        """How many tokens may be generated."""
        return self.max_completion_tokens or self.max_tokens
