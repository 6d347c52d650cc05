"""Messages of chats: all fields of the OpenAI API are accepted, and the text is used."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from app.api.schemas.neutral import Neutral
from app.text.message import Message
from app.validation import PLAIN, Must, StrictModel, wrong

MAX_MESSAGES = 1024
_TEXT, _PARTS = "<text>", "<parts>"
_NO_TOOLS = "this server calls no tools; leave it out, and say what matters of it in the content"


def _only_text(part: Any) -> Any:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text":
        what = f": {kind[:64]!r} parts can't be read, text only" if isinstance(kind, str) else ""
        raise wrong(f'must be {{"type": "text", "text": "..."}}{what}')
    return part


class TextPart(StrictModel):
    """A part of a message's content: text."""

    type: Literal["text"]
    text: str
    cache_control: Any = Field(None, description="Accepted and ignored")


def _content_tag(value: Any) -> str | None:
    if isinstance(value, str):
        return _TEXT
    return _PARTS if isinstance(value, list) else None


Parts = list[Annotated[TextPart, BeforeValidator(_only_text)]]
Content = Annotated[
    Annotated[str, Tag(_TEXT)] | Annotated[Parts, Tag(_PARTS)],
    Discriminator(
        _content_tag,
        custom_error_type=PLAIN,
        custom_error_message='must be a string, or a list of {"type": "text", "text": "..."}',
    ),
]


class Turn(StrictModel):
    """A message by its role."""

    role: Literal["system", "developer", "user", "assistant"]

    @field_validator("role", mode="before")
    @classmethod
    def _no_tools(cls, role: Any) -> Any:
        if role in ("tool", "function"):
            raise wrong(
                f"can't be {role!r}: this server calls no tools; send what the tool said in a user message"
            )
        return role

    @property
    def role_in_chat(self) -> str:
        """The role as chat templates know it."""
        return "system" if self.role == "developer" else self.role


class ChatMessage(Turn):
    """A message of a chat. Messages of earlier answers may be sent back as they came."""

    content: Content | None = Field(
        None,
        validate_default=True,
        description="Required except for the assistant, where null means the empty text",
    )
    name: Annotated[str, Field(max_length=256)] | None = None

    # Other fields of answers, ours and those of other servers.
    refusal: Annotated[Any, Neutral("")] = None
    annotations: Annotated[Any, Neutral([])] = None
    audio: Annotated[Any, Neutral(instead="leave it out, and send its transcript as content")] = None
    tool_calls: Annotated[Any, Neutral([], instead=_NO_TOOLS)] = None
    function_call: Annotated[Any, Neutral(instead=_NO_TOOLS)] = None
    tool_call_id: str | None = None  # of what a tool said, which its role refuses
    reasoning: Annotated[str | None, Must("must be a string")] = Field(
        None, description="The assistant's, before this content; the base's chat template gets it"
    )
    reasoning_content: Annotated[str | None, Must("must be a string")] = Field(
        None, description="Another name for reasoning"
    )
    parsed: Any = Field(None, description="Accepted and ignored")

    @field_validator("content")
    @classmethod
    def _has_content(cls, content: Content | None, info: ValidationInfo) -> Content | None:
        if content is None and info.data.get("role") in ("system", "developer", "user"):
            raise wrong('must be given: a string, or a list of {"type": "text", "text": "..."}')
        return content

    @model_validator(mode="after")
    def _one_reasoning(self) -> Self:
        given = {self.reasoning, self.reasoning_content} - {None, ""}
        if len(given) > 1:
            raise ValueError("reasoning and reasoning_content mean the same; send one of them")
        if given and self.role != "assistant":
            raise ValueError("only the assistant's messages have reasoning; leave it out")
        return self

    def message(self) -> Message:
        """Return the message, its parts joined."""
        parts = self.content if isinstance(self.content, list) else []
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in parts)
        named = {"name": self.name, "reasoning_content": self.reasoning or self.reasoning_content or None}
        others = {name: value for name, value in named.items() if value is not None}
        return Message(self.role_in_chat, text, others)
