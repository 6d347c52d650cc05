"""The template of a task: the user's, or one that fits; serving has the same, from the task part."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from app.errors import InvalidRequest
from app.strict_json import excerpt
from app.text.prompt_encoder import PromptEncoder
from app.text.template import Template, bind_inputs, joined, parse_template
from app.training.data_files import refused
from app.training.encoding import Base
from app.training.examples import Dataset, Example, Form

_MOST_SPELLED = 2_000  # answers that are looked at
_FIRST_EAST_ASIAN = "\u2e80"  # scripts that need no spaces follow


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
    chosen = (
        _default(dataset.form, examples, base) if given is None else ChosenTemplate(given, _unread(examples))
    )
    seams = _seams(examples, base, parse_template(chosen.source))
    return replace(chosen, warnings=(*chosen.warnings, *seams, *_unwritable(examples, base.encoder)))


def _default(form: Form, examples: Sequence[Example], base: Base) -> ChosenTemplate:
    if form is Form.MESSAGES:
        return _for_chats(examples, base)
    if form is Form.PROMPT:
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


def _unread(examples: Sequence[Example]) -> tuple[str, ...]:
    longer = _with_more_turns(examples)
    if not longer:
        return ()
    return (
        f"a task with a template reads the user's last message alone; chats with others: {len(longer)}, such "
        f"as {longer[0].place}",
    )


def _with_more_turns(examples: Sequence[Example]) -> list[Example]:
    return [each for each in examples if len(each.messages) > 1]


def _seams(examples: Sequence[Example], base: Base, template: Template) -> Iterator[str]:
    """Yield a line where answers follow the text of a causal base without a space, or with two."""
    if base.geometry.has_encoder or examples[0].messages:
        return
    if _puts_space(base.encoder):
        spaced = [each for each in examples if each.output.startswith(" ")]
        if spaced and _doubles_space(base.encoder):
            yield (
                f"answers that begin with a space: {len(spaced)} of {len(examples)}, such as "
                f"{spaced[0].place}; leave it out, since the base's tokenizer puts one before every answer"
            )
        return
    glued = [each for each in examples if _is_glued(_read_before(each, template), each.output)]
    if glued:
        one = glued[0]
        shown = excerpt(_read_before(one, template)[-20:] + one.output, 60)
        yield (
            f"answers that follow the text without a space: {len(glued)} of {len(examples)}, such as {shown} "
            f"({one.place}); end the template with a line break, or begin answers with a space"
        )


def _unwritable(examples: Sequence[Example], encoder: PromptEncoder) -> Iterator[str]:
    """Yield a line where tokens can't spell an answer (T5's have no line breaks and no braces)."""
    looked_at = examples[:: -(-len(examples) // _MOST_SPELLED)]
    changed = []
    for example in looked_at:
        written = encoder.tokenizer.text_of(encoder.answer_ids(example.output, None))
        if written.strip() != example.output.strip():
            changed.append((example, written))
    if changed:
        example, written = changed[0]
        yield (
            f"answers that the base can't write, since its tokenizer changes them: {len(changed)} of "
            f"{len(looked_at)}, such as {excerpt(example.output, 40)}, which becomes {excerpt(written, 40)} "
            f"({example.place})"
        )


def _read_before(example: Example, template: Template) -> str:
    """Return the text before the answer. Raise InvalidRequest: the template has other fields."""
    try:
        return joined(template.render(bind_inputs(template, example.inputs)))
    except InvalidRequest as error:
        raise refused(example.place, error.message) from None


def _is_glued(text: str, answer: str) -> bool:
    """Return whether words of a script that has spaces touch."""
    return answer[0].isalnum() and answer[0] < _FIRST_EAST_ASIAN and not text[-1:].isspace()


def _puts_space(encoder: PromptEncoder) -> bool:
    """Return whether the tokenizer begins every text with a space."""
    return encoder.tokenizer.text_of(encoder.tokenizer.plain_ids("a") * 2) == "a a"


def _doubles_space(encoder: PromptEncoder) -> bool:
    """Return whether it does so where the text has one already."""
    return encoder.tokenizer.plain_ids("a") != encoder.tokenizer.plain_ids(" a")
