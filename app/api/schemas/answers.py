"""The shapes of answers, for the OpenAPI document. The routes write them; a test holds them to it."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Answer(BaseModel):
    """No field but these is ever sent."""

    model_config = ConfigDict(extra="forbid")


# -- tasks ----------------------------------------------------------------------------------


class TaskRow(_Answer):
    """A task in the list."""

    id: str
    version: int | None = Field(description="What `live` means; null: nothing, or several by weight")
    version_digest: str | None
    kind: str
    virtual_tokens: int
    servable: bool
    not_servable_because: str | None
    resident: bool = Field(description="Whether its prompt is on the device")
    requests_served: int


class TaskPage(_Answer):
    """A page of the list."""

    tasks: list[TaskRow]
    next: str | None = Field(description="`after` of the next page; null: this is the last one")


class _Version(_Answer):
    version: int
    version_digest: str
    prompt_digest: str | None = Field(description="null: the task has no learned prompt")
    kind: str
    virtual_tokens: int


class Example(_Answer):
    """What the task makes of some inputs."""

    inputs: str | dict[str, str]
    expected: str


class VersionRecord(_Version):
    """A version in full."""

    template: str | None
    defaults: dict[str, Any]
    choices: list[Any]
    examples: list[Example]
    notes: str
    base: dict[str, Any]
    provenance: dict[str, Any]
    servable: bool
    not_servable_because: str | None
    resident: bool


Aliases = dict[str, int | dict[str, int]]


class ReleaseRecord(_Answer):
    """One move of the task's aliases."""

    number: int
    action: str
    alias: str | None
    aliases: Aliases = Field(description="After the move: a version, or weights by version")
    retired: bool
    who: str
    why: str
    at: str


class TaskRecord(_Answer):
    """A task in full."""

    id: str
    aliases: Aliases
    retired: bool
    versions: list[VersionRecord]
    releases: list[ReleaseRecord]
    requests_served: int


class TriedExample(Example):
    """An example, and what the new version made of it."""

    generated: str
    matches: bool


class Published(_Version):
    """A version that an upload made, or found."""

    task_id: str
    release: int | None = Field(description="null: no alias was moved")
    examples: list[TriedExample]
    warnings: list[str] = Field(description="What was left out of the upload")


class Moved(_Answer):
    """What an alias means now: a version, or weights by version."""

    task_id: str
    alias: str
    version: int | None = None
    weights: dict[str, int] | None = None
    release: int


class Retirement(_Answer):
    """Whether a task is retired now."""

    task_id: str
    retired: bool
    release: int


# -- tokens ---------------------------------------------------------------------------------


class TextToken(_Answer):
    """A token of a text."""

    id: int
    text: str


class Tokenization(_Answer):
    """What the model would see of a request."""

    tokens: list[TextToken]
    prompt_tokens: int
    virtual_tokens: int
    text: str


class Text(_Answer):
    """The text of some ids."""

    text: str


# -- OpenAI ---------------------------------------------------------------------------------


class Usage(_Answer):
    """Tokens of prompts and answers."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(_Answer):
    """Parallel lists."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float | None] | None]
    text_offset: list[int]


FinishReason = Literal["stop", "length"]


class CompletionChoice(_Answer):
    """One answer."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class _OpenAiObject(_Answer):
    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage


class Completion(_OpenAiObject):
    """The answers to all prompts."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class _Scored(_Answer):
    token: str
    logprob: float | None
    bytes: list[int]


class ScoredToken(_Scored):
    """A token, and those that might have come instead."""

    top_logprobs: list[_Scored]


class ChatLogprobs(_Answer):
    """Of every token of an answer."""

    content: list[ScoredToken]
    refusal: None


class AnswerMessage(_Answer):
    """What the model says."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(_Answer):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(_OpenAiObject):
    """The answers to a chat."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class ModelCard(_Answer):
    """A task, or the base model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


class ModelList(_Answer):
    """All that can be asked."""

    object: Literal["list"]
    data: list[ModelCard]


# -- operations -----------------------------------------------------------------------------


class Status(_Answer):
    """One word."""

    status: str


class Version(_Answer):
    """Of the server."""

    version: str


class Queue(_Answer):
    """Sequences that run, and those that wait."""

    running: int
    waiting: int


class Health(_Answer):
    """What is known depends on whether the base model is loaded."""

    status: Literal["loading", "ready", "draining", "dead"]
    version: str
    progress: str | None = Field(None, description="What loading is at")
    model: str | None = None
    device: str | None = None
    store: Literal["up", "down", "damaged"] | None = None
    tasks: int | None = None
    queue: Queue | None = None
    redis: Literal["up", "down", "off"] | None = None
    prompt_cache: dict[str, Any] | None = None


class Info(_Answer):
    """The base model, and the bounds of requests."""

    version: str
    model_id: str
    model_architecture: str
    model_dtype: str
    model_device: str
    model_fingerprint: str
    probe: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_total_tokens: int
    default_max_new_tokens: int
    generation_defaults: dict[str, Any]  # of the base's generation config, below a task's and a request's own
    generation_not_honoured: list[str]  # what of it can't be had, a line each
    max_stop_sequences: int
    max_body_bytes: int
    max_text_characters: int  # of a rendered template or chat
    max_upload_bytes: int
