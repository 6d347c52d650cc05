"""How a question is put to a model: as a chat, as plain text, by a task's instructions, or as its own one.

Whatever of a question would be ignored is refused.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from app.errors import InvalidRequest
from app.prompt import TaskVersion
from app.serving.decisions import Option, Question, QuestionKind
from app.serving.generation_request import GenerationRequest
from app.serving.publishing.task_settings import LabelledChoice, parse_choices
from app.serving.request_builder import PreparedVersion
from app.text.instructions import OPTIONS, option_lines
from app.text.message import Message
from app.text.template import PLAIN, joined, parse_template

INSTRUCTIONS = "instructions"

# What a base without a chat template reads; the label follows.
PLAIN_QUESTION = parse_template("{input}\n\nQuestion: {instructions}\nOptions:\n{options}\nAnswer:")
# The last message of the user in a chat; the label is the assistant's answer.
CHAT_QUESTION = parse_template(
    "{instructions}\n\nOptions:\n{options}\n\nAnswer with one of the options and nothing else."
)
_SPEAKERS = {"system": "System", "user": "User", "assistant": "Assistant"}
_YES = (("true", "false"), ("yes", "no"))  # of tasks that answer a predicate


class QuestionForm(Protocol):
    """A way to put questions about one input."""

    def request(self, question: Question) -> GenerationRequest:
        """Return what a question's labels follow. Raise InvalidRequest where it can't be put so."""
        ...

    def labels(self, question: Question) -> Sequence[str]:
        """Return the text of each option. Raise InvalidRequest where there is none."""
        ...


@dataclass(frozen=True, slots=True)
class AsChat:
    """The input's messages, then one of the user with the question, in the base's chat template."""

    asked: GenerationRequest
    messages: tuple[Message, ...]

    def request(self, question: Question) -> GenerationRequest:
        """Return a chat; messages of one role that follow each other are one, as most templates want it."""
        text = joined(CHAT_QUESTION.render(_described(question)))
        return replace(self.asked, messages=merged((*self.messages, Message("user", text))))

    def labels(self, question: Question) -> Sequence[str]:
        """Return the options as they are listed."""
        return option_texts(question.options)


@dataclass(frozen=True, slots=True)
class AsText:
    """The input, then the question, in plain text."""

    asked: GenerationRequest
    input: str
    space: str  # before a label

    def request(self, question: Question) -> GenerationRequest:
        """Return a text that ends where the answer begins."""
        values = {"input": self.input, **_described(question)}
        return replace(self.asked, inputs=joined(PLAIN_QUESTION.render(values)))

    def labels(self, question: Question) -> Sequence[str]:
        """Return the options as they are listed, as a text goes on with them."""
        return [self.space + text for text in option_texts(question.options)]


@dataclass(frozen=True, slots=True)
class ByInstructions:
    """A task with a field for instructions in its template: it puts any question."""

    asked: GenerationRequest
    input: str
    field: str  # for the input
    has_options: bool  # whether its template lists a question's options
    choices: Sequence[LabelledChoice]  # its own, if it has any; then no others

    def request(self, question: Question) -> GenerationRequest:
        """Return the inputs of its template."""
        values = _described(question)
        if not self.has_options:
            _refuse_descriptions(question, "lists no options of a request, as a field {options} would")
            del values[OPTIONS]
        return replace(self.asked, inputs={self.field: self.input, **values})

    def labels(self, question: Question) -> Sequence[str]:
        """Return the texts of the task's own choices, else the options as they are listed."""
        return _texts_of(question, self.choices) if self.choices else option_texts(question.options)


@dataclass(frozen=True, slots=True)
class AsTrained:
    """A task that was made for one question, which its choices answer."""

    asked: GenerationRequest
    input: str
    choices: Sequence[LabelledChoice]

    def request(self, question: Question) -> GenerationRequest:
        """Return the input alone; the question must have no instructions."""
        if question.instructions.strip():
            raise question.refused(
                "this task answers one question, which it was made for, and its template has no field "
                "{instructions}; leave the instructions empty, or use another task",
                "instructions",
            )
        _refuse_descriptions(question, "has no field for them")
        return replace(self.asked, inputs=self.input)

    def labels(self, question: Question) -> Sequence[str]:
        """Return the texts of the task's own choices."""
        return _texts_of(question, self.choices)


def form_of(
    asked: GenerationRequest,
    messages: Sequence[Message],
    version: TaskVersion | None,
    prepared: PreparedVersion,
    *,
    has_chat: bool,
    space: str,
) -> QuestionForm:
    """Return how questions are put to a version, or to the base. Raise InvalidRequest where they can't be.

    `has_chat`: whether the base has a chat template. `space` stands before a label in plain text.
    """
    program = prepared.program
    if program.reasoning is not None or program.chain is not None:
        raise InvalidRequest(
            "This task writes steps before its answer, and labels are scored without them; ask it over "
            "/v1/chat/completions or /generate, or use another task.",
            param="model",
        )
    choices = () if version is None else parse_choices(version.choices)
    template = prepared.rendering.template
    if INSTRUCTIONS in template.fields:
        return _by_instructions(asked, transcript(messages), template.fields, choices)
    if template is not PLAIN or choices:
        return _as_trained(asked, transcript(messages), template.fields, choices)
    if has_chat:
        return AsChat(asked, tuple(messages))
    return AsText(asked, transcript(messages), space)


def _by_instructions(
    asked: GenerationRequest, text: str, fields: Sequence[str], choices: Sequence[LabelledChoice]
) -> ByInstructions:
    others = [name for name in fields if name not in (INSTRUCTIONS, OPTIONS)]
    return ByInstructions(asked, text, _only(others), OPTIONS in fields, choices)


def _as_trained(
    asked: GenerationRequest, text: str, fields: Sequence[str], choices: Sequence[LabelledChoice]
) -> AsTrained:
    if not choices:
        raise InvalidRequest(
            "This task's template has no field {instructions} and the task has no choices, so it answers no "
            "questions; use a task with either of them, or the base model.",
            param="model",
        )
    _only(fields)
    return AsTrained(asked, text, choices)


def _only(fields: Sequence[str]) -> str:
    """Return the one field for the input. Raise InvalidRequest where there are more or none."""
    if len(fields) != 1:
        raise InvalidRequest(
            f"The input of decisions is one text, but this task's template has "
            f"{', '.join(fields) or 'no field'} for it; use a task with one field.",
            param="model",
        )
    return fields[0]


def transcript(messages: Sequence[Message]) -> str:
    """Return messages as one text; who speaks is named where there is anyone but the user."""
    said = merged(messages)
    if all(message.role == "user" for message in said):
        return "\n\n".join(message.content for message in said)
    return "\n\n".join(f"{_SPEAKERS[message.role]}: {message.content}" for message in said)


def merged(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return messages of which no two that follow each other have one role."""
    kept: list[Message] = []
    for message in messages:
        if kept and kept[-1].role == message.role:
            message = Message(message.role, f"{kept.pop().content}\n\n{message.content}")
        kept.append(message)
    return tuple(kept)


def option_texts(options: Sequence[Option]) -> list[str]:
    """Return what each option is called: a truth value as in JSON, a string like it in quotes."""
    truths = {json.dumps(option.value) for option in options if isinstance(option.value, bool)}
    return [_called(option, truths) for option in options]


def _called(option: Option, truths: set[str]) -> str:
    if isinstance(option.value, bool) or option.value.strip().lower() in truths:
        return json.dumps(option.value, ensure_ascii=False)
    return option.value


def _described(question: Question) -> dict[str, str]:
    """Return the values of a template's fields. Raise InvalidRequest: there are no instructions."""
    if not question.instructions.strip():
        raise question.refused(
            "must say what is to be decided, but it is empty; write the question or the claim", "instructions"
        )
    texts = option_texts(question.options)
    lines = [
        text if option.description is None else f"{text}: {option.description}"
        for text, option in zip(texts, question.options, strict=True)
    ]
    return {INSTRUCTIONS: question.instructions, OPTIONS: option_lines(lines)}


def _refuse_descriptions(question: Question, why: str) -> None:
    if any(option.description is not None for option in question.options):
        raise question.refused(
            f"descriptions would be ignored, since the task's template {why}; leave them out",
            question.options_field,
        )


def _texts_of(question: Question, choices: Sequence[LabelledChoice]) -> list[str]:
    """Return the texts of the task's choices that the options name."""
    texts = {choice.value: choice.text for choice in choices}
    if question.kind is QuestionKind.PREDICATE:
        return _truths_of(question, texts)
    found = [texts.get(_name(option)) for option in question.options]
    missing = [option for option, text in zip(question.options, found, strict=True) if text is None]
    if missing:
        raise question.refused(
            f"this task answers with {_listed(texts)}, and {_name(missing[0])!r} is none of them",
            question.options_field,
        )
    return [text for text in found if text is not None]


def _truths_of(question: Question, texts: Mapping[str, str]) -> list[str]:
    by_name = {name.strip().lower(): text for name, text in texts.items()}
    for names in _YES:
        if len(texts) == 2 and by_name.keys() == {*names}:
            return [by_name[name] for name in names]
    raise question.refused(
        f"a predicate is true or false, but this task answers with {_listed(texts)}; ask for a choice", "type"
    )


def _name(option: Option) -> str:
    return json.dumps(option.value) if isinstance(option.value, bool) else option.value


def _listed(texts: Mapping[str, str]) -> str:
    return ", ".join(map(repr, [*texts][:16])) + (", ..." if len(texts) > 16 else "")
