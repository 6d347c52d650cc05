"""The body of `/v1/responses`: a stateless subset. What would need state, or tools, is refused."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from app.api.schemas.client_defaults import OF_RESPONSES
from app.api.schemas.messages import MAX_MESSAGES, Turn
from app.api.schemas.neutral import Neutral
from app.api.schemas.openai_body import OpenAiBody, ReasoningBody
from app.api.schemas.response_format import Format, JsonObjectFormat, NamedSchema, TextFormat
from app.serving.parameters import MAX_NEW_TOKENS, MAX_TOP_TOKENS
from app.serving.program_settings import Effort
from app.serving.structured_output.constraints import Constraint, ConstraintKind
from app.text.message import Message
from app.validation import PLAIN, StrictModel, wrong

_SEND_ALL = "responses are not kept; send the earlier input and output items as input instead"
_LOGPROBS = "message.output_text.logprobs"
_TEXT, _PARTS = "<text>", "<parts>"
_MESSAGE, _REASONING = "<message>", "<reasoning>"
_PART_KINDS = ["input_text", "output_text", "text"]


class ItemPart(StrictModel):
    """A part of a message: text that was sent, or that the model generated."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Any = Field(None, description="Accepted and ignored")
    logprobs: Any = Field(None, description="Accepted and ignored")
    parsed: Any = Field(None, description="Accepted and ignored")
    prompt_cache_breakpoint: Any = Field(None, description="Accepted and ignored")


def _readable(part: Any) -> Any:
    if not isinstance(part, dict) or part.get("type") not in _PART_KINDS:
        raise wrong('must be {"type": "input_text", "text": "..."}, or output_text; only text can be read')
    return part


_Part = Annotated[ItemPart, BeforeValidator(_readable)]
_Content = Annotated[
    Annotated[str, Tag(_TEXT)] | Annotated[list[_Part], Tag(_PARTS)],
    Discriminator(
        lambda value: {str: _TEXT, list: _PARTS}.get(type(value)),
        custom_error_type=PLAIN,
        custom_error_message='must be a string, or a list of {"type": "input_text", "text": "..."}',
    ),
]


class InputMessage(Turn):
    """A message of the conversation. Those of earlier responses may be sent back as they came."""

    type: Literal["message"] | None = None
    content: _Content
    id: str | None = Field(None, description="Accepted and ignored")
    status: str | None = Field(None, description="Accepted and ignored")
    phase: str | None = Field(None, description="Accepted and ignored")

    @property
    def text(self) -> str:
        """Its parts joined."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ReasoningPart(StrictModel):
    """A text of a reasoning item."""

    type: Literal["reasoning_text", "summary_text"]
    text: str


class ReasoningItem(StrictModel):
    """The steps of an earlier answer; the base's chat template gets them with the message that follows."""

    type: Literal["reasoning"]
    id: str | None = Field(None, description="Accepted and ignored")
    status: str | None = Field(None, description="Accepted and ignored")
    summary: list[ReasoningPart] | None = Field(None, description="Used where there is no content")
    content: list[ReasoningPart] | None = None
    encrypted_content: Annotated[
        Any, Neutral("", instead="only the server that made it can read it; leave it out")
    ] = None

    @property
    def text(self) -> str:
        """Its steps joined."""
        if self.content:
            return "".join(part.text for part in self.content)
        return "\n".join(part.text for part in self.summary or [])


def _item_tag(value: Any) -> str | None:
    if not isinstance(value, dict):
        return None
    kind = value.get("type", "message")
    return {"message": _MESSAGE, "reasoning": _REASONING}.get(kind) if isinstance(kind, str) else None


Item = Annotated[
    Annotated[InputMessage, Tag(_MESSAGE)] | Annotated[ReasoningItem, Tag(_REASONING)],
    Discriminator(
        _item_tag,
        custom_error_type=PLAIN,
        custom_error_message='must be a message {"role": ..., "content": ...} or a reasoning item; this '
        "server calls no tools and keeps no items, so send what other items say as messages",
    ),
]
_Input = Annotated[
    Annotated[str, Tag(_TEXT)]
    | Annotated[list[Item], Field(min_length=1, max_length=MAX_MESSAGES), Tag(_PARTS)],
    Discriminator(
        lambda value: {str: _TEXT, list: _PARTS}.get(type(value)),
        custom_error_type=PLAIN,
        custom_error_message="must be a string, or a list of messages and reasoning items",
    ),
]


class SchemaFormat(NamedSchema, Format):
    """JSON that matches a schema."""

    type: Literal["json_schema"]

    def constraint(self, where: str) -> Constraint:
        """Return the schema's constraint."""
        return Constraint(ConstraintKind.JSON_SCHEMA, self.schema_, f"{where}.schema")


class TextOptions(StrictModel):
    """What the text must be."""

    format: Annotated[TextFormat | JsonObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None
    verbosity: Any = Field(None, description="Accepted and ignored")


class ResponseReasoning(ReasoningBody):
    """How long a task with reasoning may think, and how it is shown."""

    effort: Effort | None = Field(None, description="The same as reasoning_effort")
    summary: Literal["auto", "concise", "detailed"] | None = Field(
        None, description="List the steps, word by word, as the summary of the reasoning item too"
    )
    generate_summary: Literal["auto", "concise", "detailed"] | None = Field(
        None, description="An older name for summary"
    )
    context: Annotated[Any, Neutral("auto")] = None
    mode: Annotated[Any, Neutral("standard")] = None

    def parameters(self) -> dict[str, Any]:
        """Return generation parameters by our names."""
        return {} if self.effort is None else {"reasoning_effort": self.effort}


class ResponseStreamOptions(StrictModel):
    """What a stream reports besides text."""

    include_obfuscation: bool | None = Field(None, description="Accepted and ignored")


Includable = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]


class ResponseRequest(OpenAiBody):
    """A conversation to go on with, and how."""

    _client_defaults = OF_RESPONSES
    _format_field = "text.format"

    input: _Input = Field(description="What the user says, or all messages and reasoning items so far")
    instructions: str | None = Field(None, description="A system message before the input")
    max_output_tokens: int | None = Field(
        None, ge=1, le=MAX_NEW_TOKENS, description="Tokens to generate, at most, steps included"
    )
    text: TextOptions | None = None
    reasoning: ResponseReasoning | None = None
    top_logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_TOP_TOKENS,
        description=f"Report this many of the most probable tokens; needs {_LOGPROBS} in include",
    )
    include: list[Includable] | None = Field(
        None,
        max_length=16,
        description=f"{_LOGPROBS} reports log-probabilities; answers have nothing of the other ones",
    )
    metadata: dict[str, str] | None = Field(None, description="Returned as it is")
    stream_options: ResponseStreamOptions | None = None

    store: Annotated[Any, Neutral(False, instead="responses are not kept; leave it out, or send false")] = (
        None
    )
    previous_response_id: Annotated[Any, Neutral(instead=_SEND_ALL)] = None
    conversation: Annotated[Any, Neutral(instead=_SEND_ALL)] = None
    background: Annotated[
        Any, Neutral(False, instead="leave it out, and wait for the answer or its stream")
    ] = None
    truncation: Annotated[
        Any, Neutral("disabled", instead="leave it out, and leave the oldest items out of the input")
    ] = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.top_logprobs and not self.wants_logprobs:
            raise ValueError(f"top_logprobs needs {_LOGPROBS} in include")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options go with stream only")
        return self

    @property
    def wants_logprobs(self) -> bool:
        """Whether the answer's tokens are reported."""
        return _LOGPROBS in (self.include or ())

    @property
    def wants_summary(self) -> bool:
        """Whether the steps are listed as a summary."""
        given = self.reasoning or ResponseReasoning()
        return (given.summary or given.generate_summary) is not None

    @property
    def format(self) -> TextFormat | JsonObjectFormat | SchemaFormat | None:
        """What the answer must match."""
        return None if self.text is None else self.text.format

    @property
    def thinking(self) -> ResponseReasoning | None:
        """How long a task with reasoning may think."""
        return self.reasoning

    @property
    def limit(self) -> int | None:
        """How many tokens may be generated."""
        return self.max_output_tokens

    @property
    def num_top(self) -> int | None:
        """How many of the most probable tokens to report."""
        return self.top_logprobs

    def messages(self) -> tuple[Message, ...]:
        """Return the conversation as messages of a chat."""
        said = [Message("user", self.input)] if isinstance(self.input, str) else _messages(self.input)
        return (*([Message("system", self.instructions)] if self.instructions else []), *said)


def _messages(items: list[InputMessage | ReasoningItem]) -> Iterator[Message]:
    """Yield messages; steps go with the assistant's message after them, or with an empty one."""
    steps = ""
    for item in items:
        if isinstance(item, ReasoningItem):
            steps += item.text
            continue
        with_steps = {"reasoning_content": steps} if steps else {}
        if item.role == "assistant":
            yield Message(item.role, item.text, with_steps)
        else:
            if steps:
                yield Message("assistant", "", with_steps)
            yield Message(item.role_in_chat, item.text)
        steps = ""
    if steps:
        yield Message("assistant", "", {"reasoning_content": steps})
