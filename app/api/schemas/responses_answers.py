"""The shapes of answers of `/v1/responses`; see `answers.py`."""

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from app.api.schemas.openai_answers import CompletionTokensDetails, StopReason, TokenLogprob, VoteResult
from app.validation import closed

Status = Literal["in_progress", "completed", "incomplete", "failed"]


@closed
class SummaryText(TypedDict):
    """One step."""

    type: Literal["summary_text"]
    text: str


@closed
class ReasoningText(TypedDict):
    """All steps, as the model wrote them."""

    type: Literal["reasoning_text"]
    text: str


@closed
class ReasoningOutput(TypedDict):
    """The steps before the answer."""

    id: str
    type: Literal["reasoning"]
    summary: Annotated[
        list[SummaryText], Field(description="The steps, where reasoning.summary asks for them")
    ]
    content: list[ReasoningText]
    status: Status


@closed
class OutputText(TypedDict):
    """The answer."""

    type: Literal["output_text"]
    text: str
    annotations: Annotated[list[dict[str, Any]], Field(max_length=0)]
    logprobs: list[TokenLogprob]


@closed
class MessageOutput(TypedDict):
    """The message that the model generated."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    content: list[OutputText]
    status: Status


@closed
class InputTokensDetails(TypedDict):
    """Fields that OpenAI's clients read; keys and values that were there already are not counted."""

    cached_tokens: Literal[0]
    cache_write_tokens: Literal[0]


@closed
class ResponseUsage(TypedDict):
    """Number of tokens, those of all ballots of a vote included."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: CompletionTokensDetails
    total_tokens: int


@closed
class IncompleteDetails(TypedDict):
    """Limit that ended the response."""

    reason: Literal["max_output_tokens"]


@closed
class ResponseError(TypedDict):
    """Why a response failed after its stream had begun."""

    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
    message: str
    type: str
    param: str | None


@closed
class ReasoningGiven(TypedDict):
    """The request's own."""

    effort: str | None
    summary: str | None


@closed
class TextGiven(TypedDict):
    """The request's own."""

    format: dict[str, Any]


@closed
class ModelResponse(TypedDict):
    """A response. It is not kept: send its output items back with the next input."""

    id: str
    object: Literal["response"]
    created_at: Annotated[int, Field(description="Unix time in seconds")]
    completed_at: int | None
    status: Status
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    model: str
    output: Annotated[
        list[ReasoningOutput | MessageOutput],
        Field(
            description="A reasoning item if there are steps to show; a message, unless they led to no answer"
        ),
    ]
    usage: ResponseUsage | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: ReasoningGiven
    store: Literal[False]
    temperature: float | None
    text: TextGiven
    tool_choice: str
    tools: Annotated[list[dict[str, Any]], Field(max_length=0)]
    top_logprobs: int | None
    top_p: float | None
    truncation: Literal["disabled"]
    user: str | None
    system_fingerprint: Annotated[str, Field(description="Base model and task version that answered")]
    stop_reason: NotRequired[StopReason]
    vote: NotRequired[VoteResult]
