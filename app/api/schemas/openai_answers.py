"""The shapes of answers of the OpenAI routes; see `answers.py`."""

from typing import Annotated, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from app.api.schemas.answers import Score, VoteAnswer
from app.validation import closed


@closed
class CompletionTokensDetails(TypedDict):
    """What the generated tokens were for."""

    reasoning_tokens: Annotated[int, Field(description="Tokens of the steps before answers, of all ballots")]


@closed
class Usage(TypedDict):
    """Number of tokens of prompts and answers, those of all ballots of a vote included."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: NotRequired[
        Annotated[CompletionTokensDetails, Field(description="Of tasks with reasoning, and of chains")]
    ]


@closed
class CompletionLogprobs(TypedDict):
    """Log-probabilities as parallel lists, an item for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float | None] | None]
    text_offset: Annotated[list[int], Field(description="Characters of the answer before each token")]


FinishReason = Literal["stop", "length"]
StopReason = Annotated[
    Literal["no_answer", "loop", "max_steps"],
    Field(
        description="Why there is no answer: the model ended before one; a step of a chain repeats an "
        "earlier one; a chain took all its steps"
    ),
]
VoteResult = Annotated[VoteAnswer, Field(description="Result of a vote or an ensemble")]
ReasoningText = Annotated[str, Field(description="The steps before the answer")]


@closed
class CompletionChoice(TypedDict):
    """One completion."""

    index: int
    text: str
    reasoning: NotRequired[ReasoningText]
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    stop_reason: NotRequired[StopReason]
    score: NotRequired[Score]
    vote: NotRequired[VoteResult]


class OpenAiHead(TypedDict):
    """What all objects of the OpenAI API begin with."""

    id: str
    created: Annotated[int, Field(description="Unix time in seconds")]
    model: str
    system_fingerprint: Annotated[str, Field(description="Base model and task version that answered")]


@closed
class Completion(OpenAiHead):
    """The completions of all prompts."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage


@closed
class TopLogprob(TypedDict):
    """A token and its log-probability."""

    token: str
    logprob: float | None
    bytes: Annotated[list[int], Field(description="The token's text in UTF-8")]


@closed
class TokenLogprob(TopLogprob):
    """A generated token, and the most probable ones in its place."""

    top_logprobs: list[TopLogprob]


@closed
class ChatLogprobs(TypedDict):
    """Log-probabilities of an answer's tokens."""

    content: list[TokenLogprob]
    refusal: None


@closed
class AnswerMessage(TypedDict):
    """The message that the model generated."""

    role: Literal["assistant"]
    content: str
    reasoning: NotRequired[ReasoningText]
    reasoning_content: NotRequired[
        Annotated[str, Field(description="The same under the name that SGLang and older vLLM have")]
    ]
    refusal: None


@closed
class ChatChoice(TypedDict):
    """One answer to a chat."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: NotRequired[StopReason]
    score: NotRequired[Score]
    vote: NotRequired[VoteResult]


@closed
class ChatCompletion(OpenAiHead):
    """The answers to a chat."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


@closed
class ModelCard(TypedDict):
    """A task, or the base model."""

    id: str
    object: Literal["model"]
    created: Annotated[int, Field(description="Unix time of publication in seconds; 0: the base model")]
    owned_by: str
    root: Annotated[str, Field(description="Name of the base model")]
    parent: Annotated[str | None, Field(description="Name of the base model; null: this is it")]
    max_model_len: Annotated[
        int, Field(description="Tokens of prompt and answer, at most; of an encoder-decoder, of the answer")
    ]
    max_source_len: Annotated[
        int | None,
        Field(description="Tokens of the prompt, which an encoder reads, at most; null: there is none"),
    ]


@closed
class ModelList(TypedDict):
    """The base model and all tasks that can be served."""

    object: Literal["list"]
    data: list[ModelCard]
