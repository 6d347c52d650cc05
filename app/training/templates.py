"""The template of a task: the user's, or one that fits; serving has the same, from the task part."""

from collections.abc import Sequence
from dataclasses import dataclass

from app.text.template import parse_template
from app.training.data_files import refused
from app.training.encoding import Base
from app.training.examples import Dataset, Example, Form


@dataclass(frozen=True, slots=True)
class ChosenTemplate:
    """A template as the task part has it (None: there is none), and what the user should know of it."""

    source: str | None
    warnings: tuple[str, ...] = ()


def choose_template(dataset: Dataset, base: Base, given: str | None = None) -> ChosenTemplate:
    """Return the user's template, or the one that fits the data and the base.

    A causal base gets a line break after the inputs: nothing else says where they end, and an answer would be
    read as the rest of their last word. An encoder's input ends with EOS, a `prompt` is the whole text as it
    stands, and chats have the base's own template, so these get none. Several fields get a line each.

    Raise InvalidRequest: the template is wrong, or none can be chosen.
    """
    examples = [*dataset.train, *dataset.dev, *dataset.test]
    if given is not None:
        parse_template(given)
        return ChosenTemplate(given, _unread_turns(examples))
    if dataset.form is Form.MESSAGES:
        return _for_chats(examples, base)
    if dataset.form is Form.PROMPT:
        return ChosenTemplate(None)
    if isinstance(examples[0].inputs, str):
        return ChosenTemplate(_for_text(base))
    return _for_fields(list(examples[0].inputs), base)


def _for_text(base: Base) -> str | None:
    return None if base.geometry.has_encoder else "{text}\n"


def _for_fields(names: Sequence[str], base: Base) -> ChosenTemplate:
    end = "" if base.geometry.has_encoder else "\n"
    if len(names) == 1:
        return ChosenTemplate(f"{{{names[0]}}}{end}")
    lines = "\n".join(f"{name}: {{{name}}}" for name in names) + end
    note = f"no template was given, so each field has a line of its own: {lines!r}; --template changes that"
    return ChosenTemplate(lines, (note,))


def _for_chats(examples: Sequence[Example], base: Base) -> ChosenTemplate:
    if base.encoder.chat.exists:
        return ChosenTemplate(None)
    longer = _with_more_turns(examples)
    if longer:
        raise refused(
            longer[0].place,
            "the base has no chat template, so a task reads the user's last message alone, but there are "
            "messages before it; write their text into a template (--template 'You are brief. {text}'), or "
            "leave them out",
        )
    return ChosenTemplate(_for_text(base))


def _unread_turns(examples: Sequence[Example]) -> tuple[str, ...]:
    longer = _with_more_turns(examples)
    if not longer:
        return ()
    return (
        f"a task with a template reads the user's last message alone; chats with others: {len(longer)}, such "
        f"as {longer[0].place}",
    )


def _with_more_turns(examples: Sequence[Example]) -> list[Example]:
    return [each for each in examples if len(each.messages) > 1]
