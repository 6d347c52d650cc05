"""Templates of named fields: `Review: {text}\\nSentiment:`.

`{name}` is a field, `{{` and `}}` are braces. Nothing else exists: no attributes, indexes,
expressions, conversions or format specifications. Values are put in as they are; braces in a value
stay braces, because a value is never parsed.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

from app.errors import InvalidRequest

MAX_TEMPLATE_CHARS = 65_536
MAX_RENDERED_CHARS = 4_000_000  # of any request's text
MAX_FIELDS = 32
MAX_PLACES = 64  # a field may stand in several places, but not multiply the text at will
FIELD_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")

_SPECIAL = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of text: the template's own (`field` is None), or what fills a field."""

    text: str
    field: str | None = None


@dataclass(frozen=True, slots=True)
class Template:
    """A parsed template. In `pieces` a field's piece holds no text; `render` fills it."""

    pieces: tuple[Piece, ...]
    fields: tuple[str, ...]  # each once, in order of appearance

    @property
    def leading(self) -> str:
        """Return the constant text before the first field."""
        return self.pieces[0].text if self.pieces[0].field is None else ""

    @property
    def source(self) -> str:
        """Return the text that `parse_template` makes this template of."""
        return "".join(
            f"{{{piece.field}}}" if piece.field else piece.text.replace("{", "{{").replace("}", "}}")
            for piece in self.pieces
        )

    def filled(self, values: Mapping[str, str]) -> "Template":
        """Return the template with text of its own where the fields in `values` stand."""
        return _template(
            Piece(values[piece.field]) if piece.field and piece.field in values else piece
            for piece in self.pieces
        )

    def renamed(self, field: str, name: str) -> "Template":
        """Return the template with a field of another name in a field's place."""
        return _template(Piece("", name) if piece.field == field else piece for piece in self.pieces)

    def after(self, text: str) -> "Template":
        """Return the template with text of its own before all that it has."""
        return _template((Piece(text), *self.pieces))

    def num_chars(self, values: Mapping[str, str]) -> int:
        """Return the length of the rendered text, without rendering it."""
        return sum(
            len(piece.text) if piece.field is None else len(values[piece.field]) for piece in self.pieces
        )

    def render(self, values: Mapping[str, str]) -> tuple[Piece, ...]:
        """Put `values`, one for each field, where the fields stand."""
        return tuple(
            piece if piece.field is None else Piece(values[piece.field], piece.field) for piece in self.pieces
        )


# The template of the base model, and of a task that has none.
PLAIN = Template((Piece("", "inputs"),), ("inputs",))


def parse_template(source: str | None) -> Template:
    """Parse `source`; None is PLAIN. Raise InvalidRequest, which says what is wrong and where."""
    if source is None:
        return PLAIN
    if len(source) > MAX_TEMPLATE_CHARS:
        raise _bad(f"it has {len(source)} characters, more than {MAX_TEMPLATE_CHARS}")
    template = _template(_scan(source))
    if not template.fields:
        raise _bad(
            "it has no field, so a request's inputs would go nowhere; write {inputs} where they belong"
        )
    if len(template.fields) > MAX_FIELDS:
        raise _bad(f"it has {len(template.fields)} fields, more than {MAX_FIELDS}")
    if len(template.pieces) > 2 * MAX_PLACES:
        raise _bad(f"its fields stand in more than {MAX_PLACES} places")
    return template


def _template(pieces: Iterable[Piece]) -> Template:
    merged = tuple(_merge(pieces))
    return Template(merged, tuple(dict.fromkeys(piece.field for piece in merged if piece.field is not None)))


def _scan(source: str) -> Iterator[Piece]:
    position = 0
    for match in _SPECIAL.finditer(source):
        yield Piece(source[position : match.start()])
        position = match.end()
        token = match.group()
        if token in ("{{", "}}"):
            yield Piece(token[0])
        elif match.group(1) is None:
            raise _bad(
                f"a lone {token} at character {match.start()}; write {token * 2} for the character itself"
            )
        else:
            yield Piece("", _field_name(match.group(1), match.start()))
    yield Piece(source[position:])


def _field_name(name: str, position: int) -> str:
    if not FIELD_NAME.fullmatch(name):
        raise _bad(
            f"field {{{name[:64]}}} at character {position} is no plain name (letters, digits, _, at most "
            "64); attributes, indexes, conversions and formats are not supported"
        )
    return name


def _merge(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Join neighbouring literals and drop empty ones."""
    for is_literal, group in groupby(pieces, key=lambda piece: piece.field is None):
        if not is_literal:
            yield from group
        elif text := "".join(piece.text for piece in group):
            yield Piece(text)


def _bad(reason: str) -> InvalidRequest:
    return InvalidRequest(f"The template can't be used: {reason}.", param="template")


def joined(pieces: tuple[Piece, ...]) -> str:
    """Return the whole text of rendered pieces."""
    return "".join(piece.text for piece in pieces)


def bind_inputs(template: Template, inputs: str | Mapping[str, str]) -> dict[str, str]:
    """Match `inputs` to the template's fields. Raise InvalidRequest, which names those that differ."""
    if isinstance(inputs, str):
        if len(template.fields) > 1:
            raise InvalidRequest(
                f"This task's template has {len(template.fields)} fields, so inputs must be an object with "
                f"exactly: {', '.join(template.fields)}.",
                param="inputs",
            )
        return {template.fields[0]: _text(inputs, "inputs")}
    _check_names(template.fields, inputs)
    return {name: _text(inputs[name], f"inputs.{name}") for name in template.fields}


def _check_names(fields: tuple[str, ...], inputs: Mapping[str, str]) -> None:
    missing = [name for name in fields if name not in inputs]
    unknown = sorted(str(name)[:64] for name in inputs if name not in fields)
    if not missing and not unknown:
        return
    problems = ([f"missing: {', '.join(missing)}"] if missing else []) + (
        [f"unknown: {', '.join(unknown[:MAX_FIELDS])}"] if unknown else []
    )
    raise InvalidRequest(
        f"inputs must have exactly the fields {', '.join(fields)} ({'; '.join(problems)}).", param="inputs"
    )


def _text(value: object, param: str) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(f"{param} must be a string.", param=param)
    check_unicode(value, param)
    return value


def check_unicode(text: str, param: str) -> None:
    """Raise InvalidRequest where `text` holds what JSON can spell and UTF-8 can't."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(
            f"{param} holds half of a surrogate pair, which is no character; send valid Unicode.", param=param
        ) from None
