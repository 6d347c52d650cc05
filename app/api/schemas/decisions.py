"""Bodies of `/v1/decisions`, as the OpenAI API has them: one input, and questions about it."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator

from app.api.schemas.generate import Reference, User
from app.errors import InvalidRequest
from app.serving.decisions import PREDICATE, Option, Question, QuestionKind
from app.serving.publishing.task_settings import MAX_CHOICE_CHARS
from app.text.message import Message
from app.validation import PLAIN, Must, StrictModel, wrong

MAX_QUESTIONS = 400
MAX_CHOICES = 255
MAX_LEVELS = 10
MAX_ITEMS = 1024
MAX_INSTRUCTION_CHARS = 65_536
MAX_DESCRIPTION_CHARS = 4096
MAX_NAME_CHARS = 256
MAX_JSON_LEVELS = 32
MAX_JSON_VALUES = 10_000
MAX_JSON_BYTES = 256 << 10

_IGNORED = "Accepted and ignored"
_TEXT, _PARTS = "<text>", "<parts>"


class TextPart(StrictModel):
    """Text of the user."""

    type: Literal["input_text"]
    text: str
    prompt_cache_breakpoint: dict[str, Any] | None = Field(None, description=_IGNORED)


class JsonPart(StrictModel):
    """JSON, which the model reads as text."""

    type: Literal["input_json"]
    data: Annotated[
        dict[str, Any] | list[dict[str, Any]], Must("must be an object, or a list of objects")
    ] = Field(
        description=f"At most {MAX_JSON_LEVELS} levels, {MAX_JSON_VALUES} values and {MAX_JSON_BYTES} bytes"
    )

    @field_validator("data")
    @classmethod
    def _bounded(cls, data: Any) -> Any:
        _check_json(data)
        return data

    @property
    def text(self) -> str:
        """The JSON without white space."""
        return _compact(self.data)


class OutputPart(StrictModel):
    """Text of the assistant."""

    type: Literal["output_text"]
    text: str


class RefusalPart(StrictModel):
    """What the assistant said instead of an answer."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        """What it said."""
        return self.refusal


def _no_image(part: Any) -> Any:
    if isinstance(part, dict) and part.get("type") == "input_image":
        raise wrong("is an image, and this server's models read text only; describe it in an input_text part")
    return part


def _content_tag(value: Any) -> str | None:
    if isinstance(value, str):
        return _TEXT
    return _PARTS if isinstance(value, list) else None


_OF_CONTENT = Discriminator(
    _content_tag, custom_error_type=PLAIN, custom_error_message="must be a string, or a list of parts"
)
_InputPart = Annotated[
    Annotated[TextPart | JsonPart, Field(discriminator="type")], BeforeValidator(_no_image)
]
_TextOnly = Annotated[TextPart, BeforeValidator(_no_image)]
_OutputPart = Annotated[OutputPart | RefusalPart, Field(discriminator="type")]
_InputParts = Annotated[list[_InputPart], Field(max_length=MAX_ITEMS)]
_TextParts = Annotated[list[_TextOnly], Field(max_length=MAX_ITEMS)]
_OutputParts = Annotated[list[_OutputPart], Field(max_length=MAX_ITEMS)]
InputContent = Annotated[Annotated[str, Tag(_TEXT)] | Annotated[_InputParts, Tag(_PARTS)], _OF_CONTENT]
TextContent = Annotated[Annotated[str, Tag(_TEXT)] | Annotated[_TextParts, Tag(_PARTS)], _OF_CONTENT]
OutputContent = Annotated[Annotated[str, Tag(_TEXT)] | Annotated[_OutputParts, Tag(_PARTS)], _OF_CONTENT]


class UserMessage(StrictModel):
    """A message of the user."""

    type: Literal["message"] | None = None
    role: Literal["user"]
    content: InputContent

    def message(self, calls: dict[str, str]) -> Message:
        """Return it as a message of a chat."""
        return Message("user", _text_of(self.content))


class SystemMessage(StrictModel):
    """What the developer says."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer"]
    content: TextContent

    def message(self, calls: dict[str, str]) -> Message:
        """Return it as a message of a chat."""
        return Message("system", _text_of(self.content))


class AssistantMessage(StrictModel):
    """A message of the assistant."""

    type: Literal["message"] | None = None
    role: Literal["assistant"]
    content: OutputContent
    phase: Literal["commentary", "final_answer"] | None = Field(None, description=_IGNORED)

    def message(self, calls: dict[str, str]) -> Message:
        """Return it as a message of a chat."""
        return Message("assistant", _text_of(self.content))


class _ToolItem(StrictModel):
    call_id: str = Field(max_length=MAX_NAME_CHARS)
    id: str | None = Field(None, description=_IGNORED)
    status: Literal["in_progress", "completed", "incomplete"] | None = Field(None, description=_IGNORED)


class ToolCall(_ToolItem):
    """A call of a function or a tool, which the model reads as the assistant's text."""

    type: Literal["function_call", "custom_tool_call"]
    name: str = Field(max_length=MAX_NAME_CHARS)
    namespace: str | None = Field(None, max_length=MAX_NAME_CHARS)
    arguments: str | None = Field(None, description="Of a function_call")
    input: str | None = Field(None, description="Of a custom_tool_call")

    def message(self, calls: dict[str, str]) -> Message:
        """Return it as a message, and note its name for the output that comes. Raise InvalidRequest."""
        text, other = (
            (self.arguments, self.input) if self.type == "function_call" else (self.input, self.arguments)
        )
        if text is None or other is not None:
            raise InvalidRequest(
                "input: a function_call has arguments, a custom_tool_call has input.", param="input"
            )
        calls[self.call_id] = self.name if self.namespace is None else f"{self.namespace}.{self.name}"
        return Message("assistant", f"Call of {calls[self.call_id]}: {text}")


class ToolOutput(_ToolItem):
    """What a function or a tool answered, which the model reads as the user's text."""

    type: Literal["function_call_output", "custom_tool_call_output"]
    output: TextContent

    def message(self, calls: dict[str, str]) -> Message:
        """Return it as a message that names the call. Raise InvalidRequest where there was none."""
        if self.call_id not in calls:
            raise InvalidRequest(
                f"input: no call before this output has the call_id {self.call_id[:64]!r}; send it too.",
                param="input",
            )
        return Message("user", f"Output of {calls[self.call_id]}: {_text_of(self.output)}")


def _item_tag(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(value, dict) and kind in (None, "message"):
        kind = value.get("role")
        kind = "system" if kind == "developer" else kind
    return kind.removeprefix("custom_tool_").removeprefix("function_") if isinstance(kind, str) else None


InputItem = Annotated[
    Annotated[UserMessage, Tag("user")]
    | Annotated[SystemMessage, Tag("system")]
    | Annotated[AssistantMessage, Tag("assistant")]
    | Annotated[ToolCall, Tag("call")]
    | Annotated[ToolOutput, Tag("call_output")],
    Discriminator(
        _item_tag,
        custom_error_type=PLAIN,
        custom_error_message="must be a message of user, assistant, system or developer, a call of a "
        "function or tool, or its output",
    ),
]
Input = Annotated[
    Annotated[str, Tag(_TEXT)]
    | Annotated[list[InputItem], Field(min_length=1, max_length=MAX_ITEMS), Tag(_PARTS)],
    Discriminator(
        _content_tag, custom_error_type=PLAIN, custom_error_message="must be a string, or a list of messages"
    ),
]
Instructions = Annotated[
    Annotated[str, Field(max_length=MAX_INSTRUCTION_CHARS), Tag(_TEXT)] | Annotated[_InputParts, Tag(_PARTS)],
    _OF_CONTENT,
]
Name = Annotated[str, Field(max_length=MAX_NAME_CHARS)]
Label = Annotated[str, Field(min_length=1, max_length=MAX_CHOICE_CHARS)]
Description = Annotated[str, Field(min_length=1, max_length=MAX_DESCRIPTION_CHARS)]


class Choice(StrictModel):
    """A value to choose."""

    value: Annotated[
        Label | bool,
        Must(f"must be a string of 1 to {MAX_CHOICE_CHARS} characters, or true or false"),
    ] = Field(description='true and "true" are two values')
    description: Description | None = None


class Level(StrictModel):
    """A place on a scale."""

    label: Label
    description: Description | None = None


class PredicateQuestion(StrictModel):
    """Whether a statement about the input is true."""

    type: Literal["predicate"]
    instructions: Instructions
    name: Name | None = None

    @property
    def options(self) -> tuple[Option, ...]:
        """True, then false."""
        return PREDICATE


class ChoiceQuestion(StrictModel):
    """Which of some values fits the input."""

    type: Literal["choice"]
    instructions: Instructions
    name: Name | None = None
    choices: list[Choice] = Field(min_length=2, max_length=MAX_CHOICES)

    @field_validator("choices")
    @classmethod
    def _unique(cls, choices: list[Choice]) -> list[Choice]:
        if len({(type(each.value), each.value) for each in choices}) < len(choices):
            raise wrong("has a value twice; each must be unique")
        return choices

    @property
    def options(self) -> tuple[Option, ...]:
        """The values, in order."""
        return tuple(Option(each.value, each.description) for each in self.choices)


class ScoreQuestion(StrictModel):
    """Where the input is on a scale."""

    type: Literal["score"]
    instructions: Instructions
    name: Name | None = None
    levels: list[Level] = Field(
        min_length=2, max_length=MAX_LEVELS, description="In order; the first one has the value 0"
    )

    @field_validator("levels")
    @classmethod
    def _unique(cls, levels: list[Level]) -> list[Level]:
        if len({each.label for each in levels}) < len(levels):
            raise wrong("has a label twice; each must be unique")
        return levels

    @property
    def options(self) -> tuple[Option, ...]:
        """The labels, in order."""
        return tuple(Option(each.label, each.description) for each in self.levels)


class DecisionBody(StrictModel):
    """One input, and what is to be decided about it."""

    model: Reference = Field(
        description="Name of the base model, or a task: task, task@alias, task@3 or task@sha256:<digest>"
    )
    input: Input
    questions: list[
        Annotated[PredicateQuestion | ChoiceQuestion | ScoreQuestion, Field(discriminator="type")]
    ] = Field(min_length=1, max_length=MAX_QUESTIONS)
    user: User | None = None
    prompt_cache_key: str | None = Field(None, description=_IGNORED)
    prompt_cache_options: dict[str, Any] | None = Field(None, description=_IGNORED)
    safety_identifier: str | None = Field(None, description=_IGNORED)

    def messages(self) -> tuple[Message, ...]:
        """Return the input as a chat. Raise InvalidRequest where it is empty, or an output has no call."""
        calls: dict[str, str] = {}
        items = [Message("user", self.input)] if isinstance(self.input, str) else None
        found = tuple(items or [item.message(calls) for item in self.input if not isinstance(item, str)])
        if not any(message.content.strip() for message in found):
            raise InvalidRequest("input is empty: there is nothing to decide about.", param="input")
        return found

    def asked(self) -> tuple[Question, ...]:
        """Return the questions."""
        return tuple(
            Question(
                number=number,
                kind=QuestionKind(each.type),
                instructions=_text_of(each.instructions),
                options=each.options,
                name=each.name,
            )
            for number, each in enumerate(self.questions)
        )


def _text_of(content: str | Sequence[TextPart | JsonPart | OutputPart | RefusalPart]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


def _compact(data: Any) -> str:
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _check_json(data: Any) -> None:
    """Raise PydanticCustomError where JSON is more than a model is to read, or no JSON."""
    level, num_levels, num_values = [data], 0, 0
    while level:
        num_levels, num_values = num_levels + 1, num_values + len(level)
        if num_values > MAX_JSON_VALUES:
            raise wrong(f"has more than {MAX_JSON_VALUES} values; send less")
        below = [each.values() if isinstance(each, dict) else each for each in level if _is_container(each)]
        level = [value for values in below for value in values]
        if level and num_levels >= MAX_JSON_LEVELS and any(map(_is_container, level)):
            raise wrong(f"nests deeper than {MAX_JSON_LEVELS} levels; send it flatter")
    try:
        size = len(_compact(data).encode())
    except ValueError:
        raise wrong("holds a number that is not finite; leave it out") from None
    if size > MAX_JSON_BYTES:
        raise wrong(f"has {size} bytes, more than {MAX_JSON_BYTES}; send less")


def _is_container(value: Any) -> bool:
    return isinstance(value, dict | list)
