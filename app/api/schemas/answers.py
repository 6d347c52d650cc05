"""The shapes of answers: what the routes return, held by mypy, and what the OpenAPI document says.

They are documentation at run time: the routes send their JSON as it is, and nothing is validated again.
"""

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from app.serving.task_rows import Example, HistoryRow, PublishedVersion, TaskLine, VersionContent
from app.validation import closed

TgiErrorType = Literal["validation", "overloaded", "generation"]
_Reason = Annotated[str | None, Field(description="Why it can't be served; null: it can")]
_Resident = Annotated[bool, Field(description="Whether the learned prompt is on the device now")]

# -- errors ---------------------------------------------------------------------------------


@closed
class ErrorBody(TypedDict):
    """What went wrong and what to do next."""

    message: str
    type: str
    param: Annotated[str | None, Field(description="Field of the request that is at fault")]
    code: Annotated[str, Field(description="Machine-readable, such as invalid_request or not_found")]


@closed
class ErrorEnvelope(TypedDict):
    """The body of every error."""

    error: ErrorBody
    error_type: NotRequired[
        Annotated[
            TgiErrorType | None,
            Field(description="Error type of text-generation-inference; absent where it has none"),
        ]
    ]


# -- tasks ----------------------------------------------------------------------------------


@closed
class TaskRow(TaskLine):
    """A task in the list."""

    servable: bool
    not_servable_because: _Reason
    resident: _Resident
    requests_served: Annotated[int, Field(description="Since the server started")]


@closed
class TaskPage(TypedDict):
    """A page of the list of tasks."""

    tasks: list[TaskRow]
    next: Annotated[str | None, Field(description="`after` for the next page; null: this is the last one")]


@closed
class VersionRecord(VersionContent):
    """A version in full."""

    servable: bool
    not_servable_because: _Reason
    resident: _Resident


@closed
class TaskRecord(HistoryRow):
    """A task in full."""

    versions: list[VersionRecord]
    requests_served: Annotated[int, Field(description="Since the server started")]


@closed
class TriedExample(Example):
    """An example, and what the new version generated for it."""

    generated: str
    matches: Annotated[bool, Field(description="Whether `generated` is `expected`, spaces around it aside")]


@closed
class Published(PublishedVersion):
    """The version of an upload."""

    examples: list[TriedExample]
    warnings: Annotated[list[str], Field(description="Parts of the upload that the version doesn't use")]


# -- tokens ---------------------------------------------------------------------------------


@closed
class TextToken(TypedDict):
    """A token of a text."""

    id: int
    text: str


@closed
class Tokenization(TypedDict):
    """The tokens of a request's prompt."""

    tokens: list[TextToken]
    prompt_tokens: Annotated[int, Field(description="Length of `tokens`")]
    virtual_tokens: Annotated[int, Field(description="Positions that the learned prompt takes before them")]
    text: Annotated[str, Field(description="The rendered prompt")]


@closed
class Text(TypedDict):
    """The text of token ids."""

    text: str


# -- OpenAI ---------------------------------------------------------------------------------


@closed
class Usage(TypedDict):
    """Number of tokens of prompts and answers."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


@closed
class CompletionLogprobs(TypedDict):
    """Log-probabilities as parallel lists, an item for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float | None] | None]
    text_offset: Annotated[list[int], Field(description="Characters of the answer before each token")]


FinishReason = Literal["stop", "length"]


@closed
class CompletionChoice(TypedDict):
    """One completion."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


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
    refusal: None


@closed
class ChatChoice(TypedDict):
    """One answer to a chat."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


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
    max_model_len: Annotated[int, Field(description="Tokens of prompt and answer, at most")]


@closed
class ModelList(TypedDict):
    """The base model and all tasks that can be served."""

    object: Literal["list"]
    data: list[ModelCard]


# -- operations -----------------------------------------------------------------------------


@closed
class Status(TypedDict):
    """The state of the server."""

    status: str


@closed
class Version(TypedDict):
    """The version of the server."""

    version: str


@closed
class Queue(TypedDict):
    """Number of sequences that run, and that wait."""

    running: int
    waiting: int


@closed
class Health(TypedDict):
    """The state of the server; more is known once the base model is loaded."""

    status: Literal["loading", "ready", "draining", "dead"]
    version: str
    progress: NotRequired[Annotated[str | None, Field(description="Current step of loading")]]
    model: NotRequired[Annotated[str | None, Field(description="Name of the base model")]]
    device: NotRequired[str | None]
    store: NotRequired[Literal["up", "down", "damaged"] | None]
    tasks: NotRequired[Annotated[int | None, Field(description="Number of tasks that the key may use")]]
    queue: NotRequired[Queue | None]
    redis: NotRequired[Literal["up", "down", "off"] | None]
    prompt_cache: NotRequired[
        Annotated[dict[str, Any] | None, Field(description="Hits, misses and bytes of each tier")]
    ]


@closed
class Info(TypedDict):
    """The base model, and the limits of requests."""

    version: str
    model_id: str
    model_architecture: str
    model_dtype: str
    model_device: str
    model_fingerprint: Annotated[str, Field(description="Digest of weights, configuration and tokenizer")]
    probe: Annotated[str, Field(description="Report of the check of the model at load")]
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_total_tokens: Annotated[int, Field(description="Virtual, prompt and new tokens, at most")]
    default_max_new_tokens: int
    generation_defaults: Annotated[
        dict[str, Any],
        Field(description="From the base's generation config; tasks and requests override them"),
    ]
    generation_not_honoured: Annotated[
        list[str], Field(description="Settings of the generation config that are not supported")
    ]
    max_stop_sequences: int
    max_body_bytes: int
    max_text_characters: Annotated[int, Field(description="Of a rendered template or chat")]
    max_upload_bytes: int
