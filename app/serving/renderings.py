"""How a version puts inputs into text: by its template, its chain's, or one of its paraphrases."""

from collections.abc import Sequence
from typing import Any

from app.errors import InvalidRequest
from app.prompt import TaskVersion, VersionDraft
from app.serving.program_settings import ChainSettings, ProgramSettings
from app.text.instructions import LAST, SO_FAR, Rendering, Shot, with_options
from app.text.template import PLAIN, Template, parse_template


def rendering_of(
    version: TaskVersion | VersionDraft, program: ProgramSettings, paraphrase: int | None = None
) -> Rendering:
    """Return how a version renders: with its options and its examples in the text.

    Raise InvalidRequest, which names the field at fault, such as `chain.template`.
    """
    options = [option_text(choice) for choice in version.choices]
    plain = rendering(version.template, options, program.chain)
    if paraphrase is not None:
        plain = _paraphrased(plain, program.paraphrases, options, paraphrase)
    return plain.with_shots([Shot(shot.inputs, shot.output) for shot in program.few_shot])


def first_template(draft: VersionDraft) -> str | None:
    """Return a template for what a version reads before there are steps: its own one, with what is constant.

    None: its inputs as they are. Raise InvalidRequest, as `rendering_of`.
    """
    program = ProgramSettings.of(draft.program)
    read = rendering_of(draft, program, draft.defaults.get("paraphrase"))
    return None if read.template is PLAIN else read.first.source


def option_text(choice: Any) -> str:
    """Return what a choice lets the model write; one without a name of its own is that text."""
    return str(choice if isinstance(choice, str) else choice["text"])


def rendering(template: str | None, options: Sequence[str], chain: ChainSettings | None) -> Rendering:
    """Return how a template, or the chain's beside it, renders inputs. Raise InvalidRequest."""
    own = _parsed(template, options, "template")
    return Rendering(own, own) if chain is None else _chained(template, own, options, chain)


def _chained(source: str | None, own: Template, options: Sequence[str], chain: ChainSettings) -> Rendering:
    """Return how a chain renders; without a template beside it, its own fields are those of the inputs."""
    read = _parsed(chain.template, options, "chain.template")
    feeds = [name for name in (SO_FAR, LAST) if name in read.fields]
    if len(feeds) != 1:
        raise _bad(f"must have either {{{SO_FAR}}} or {{{LAST}}}, through which a step reads those before it")
    others = tuple(name for name in read.fields if name not in feeds)
    asked = Template((), others) if source is None and others else own
    if taken := {SO_FAR, LAST} & {*asked.fields}:
        raise InvalidRequest(
            f"has the field {{{min(taken)}}}, which is a chain's own; call it otherwise", param="template"
        )
    if feeds == [LAST] and len(asked.fields) > 1:
        raise _bad(
            f"has {{{LAST}}}, which is the inputs at first, so the inputs must be one field, not "
            f"{', '.join(asked.fields)}; use {{{SO_FAR}}}"
        )
    differing = {*asked.fields} ^ {*others} if feeds == [SO_FAR] else {*others} - {*asked.fields}
    if differing:
        raise _bad(
            f"must have the fields of the inputs, {', '.join(asked.fields)}, beside {{{feeds[0]}}}; it has "
            f"{', '.join(others) or 'none'}"
        )
    return Rendering(read, asked, feeds[0], chain.step_ends)


def _paraphrased(
    plain: Rendering, paraphrases: Sequence[str], options: Sequence[str], index: int
) -> Rendering:
    if not 0 <= index < len(paraphrases):
        raise InvalidRequest(
            f"paraphrase {index}: the task has {_numbered(len(paraphrases))}",
            param="parameters.paraphrase",
        )
    param = f"paraphrases[{index}]"
    read = _parsed(paraphrases[index], options, param)
    if {*read.fields} != {*plain.asked.fields}:
        raise InvalidRequest(
            f"must have the template's fields, {', '.join(plain.asked.fields)}; it has "
            f"{', '.join(read.fields)}",
            param=param,
        )
    return Rendering(read, plain.asked)


def _numbered(count: int) -> str:
    """Return how many paraphrases there are, and how to name one."""
    if count > 1:
        return f"{count} paraphrases, numbered from 0 to {count - 1}."
    return "one paraphrase; send 0, or leave it out." if count else "no paraphrases; leave it out."


def _parsed(source: str | None, options: Sequence[str], param: str) -> Template:
    """Return a template with its options in it; PLAIN stays itself."""
    try:
        template = with_options(parse_template(source), options)
    except InvalidRequest as error:
        raise InvalidRequest(error.message, param=param) from None
    if not template.fields:
        raise InvalidRequest(
            "has no field beside {options}, which the choices fill, so a request's inputs would go nowhere",
            param=param,
        )
    return template


def _bad(reason: str) -> InvalidRequest:
    return InvalidRequest(reason, param="chain.template")
