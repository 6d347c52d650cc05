"""What an answer can be held to: a JSON schema, a regex, one of some texts; and how that reads as a grammar.

The text of a grammar is llguidance's own. Objects are written as Python's `json.dumps` writes them, with
one space after each comma and colon and none elsewhere: where white space is free, a weak model goes on
with it for ever.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum, auto
from typing import Any

from llguidance import LLMatcher

from app.errors import InvalidRequest
from app.serving.manifest import MAX_CHOICE_CHARS, MAX_CHOICES

MAX_SCHEMA_CHARS = 65_536
MAX_REGEX_CHARS = 16_384
# llguidance works out remainders by every multiple at once, which none of its own limits bound.
MAX_MULTIPLE = 10_000


class ConstraintKind(Enum):
    """What a constraint's value is."""

    JSON_SCHEMA = auto()  # a schema as an object, or as JSON text
    REGEX = auto()  # the whole answer matches; no look-around, no back-references
    CHOICE = auto()  # the answer is one of these texts


@dataclass(frozen=True, slots=True)
class Constraint:
    """What an answer must be. `param` is the request's field that says so."""

    kind: ConstraintKind
    value: Any
    param: str


def grammar_of(constraint: Constraint) -> str:
    """The grammar's text; whether it can be followed is for the compiler to say. Raises InvalidRequest."""
    write = {
        ConstraintKind.JSON_SCHEMA: _json_schema,
        ConstraintKind.REGEX: _regex,
        ConstraintKind.CHOICE: _choice,
    }[constraint.kind]
    return write(constraint.value, constraint.param)


def _check_text(text: str, param: str) -> None:
    """JSON can spell what UTF-8 can't."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"{param} holds half a surrogate pair, which is no text.", param=param) from None


def _regex(pattern: Any, param: str) -> str:
    if not isinstance(pattern, str) or not 1 <= len(pattern) <= MAX_REGEX_CHARS:
        raise InvalidRequest(f"{param} must be a regex of 1 to {MAX_REGEX_CHARS} characters.", param=param)
    _check_text(pattern, param)
    return LLMatcher.grammar_from_regex(pattern)


def _choice(texts: Sequence[Any], param: str) -> str:
    valid = all(isinstance(text, str) and 1 <= len(text) <= MAX_CHOICE_CHARS for text in texts)
    if not valid or not 1 <= len(texts) <= MAX_CHOICES:
        raise InvalidRequest(
            f"{param} must be a list of 1 to {MAX_CHOICES} strings of 1 to {MAX_CHOICE_CHARS} characters.",
            param=param,
        )
    _check_text("".join(texts), param)
    return LLMatcher.grammar_from_lark(f"start: {' | '.join(map(_literal, dict.fromkeys(texts)))}")


def _literal(text: str) -> str:
    """A string of llguidance's grammar language, which takes JSON's escapes but no raw control characters."""
    return '"' + "".join(c if c.isprintable() and c not in '"\\' else _escaped(c) for c in text) + '"'


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else character


def _json_schema(schema: Any, param: str) -> str:
    text = schema if isinstance(schema, str) else _written(schema, param)
    if len(text) > MAX_SCHEMA_CHARS:
        raise InvalidRequest(
            f"{param} has {len(text)} characters as JSON; at most {MAX_SCHEMA_CHARS} are accepted.",
            param=param,
        )
    _check_text(text, param)
    _check_schema(_read(text, param), param)
    try:
        return LLMatcher.grammar_from_json_schema(
            text,
            overrides={
                "whitespace_flexible": False,
                "item_separator": ", ",
                "key_separator": ": ",
                "coerce_one_of": False,
                "lenient": False,
            },
        )
    except ValueError:
        raise InvalidRequest(
            f"{param} is nested too deeply (beyond about 100 levels), or holds a number out of range.",
            param=param,
        ) from None


def _written(schema: Any, param: str) -> str:
    try:
        return json.dumps(schema, allow_nan=False, ensure_ascii=False)
    except (ValueError, RecursionError):
        raise InvalidRequest(f"{param} is nested too deeply, or holds NaN.", param=param) from None


def _read(text: str, param: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidRequest(f"{param} must be a JSON schema: an object, or its text.", param=param) from None


def _check_schema(schema: Any, param: str) -> None:
    if not isinstance(schema, Mapping):
        raise InvalidRequest(f"{param} must be a JSON schema, which is an object.", param=param)
    if "x-guidance" in schema:
        raise InvalidRequest(f"{param}: x-guidance is not supported; leave it out.", param=param)
    common = 1
    for multiple in _multiples(schema):
        common = math.lcm(common, multiple)
        if common > MAX_MULTIPLE:
            raise InvalidRequest(
                f"{param}: the least common multiple of the schema's multipleOf (without trailing zeros) "
                f"exceeds {MAX_MULTIPLE}; leave some out, or check the answer yourself.",
                param=param,
            )


def _multiples(schema: Any) -> Iterator[int]:
    """The significant digits of every multipleOf, as whole numbers."""
    waiting = [schema]
    while waiting:
        node = waiting.pop()
        if isinstance(node, Mapping):
            multiple = node.get("multipleOf")
            if isinstance(multiple, int | float) and multiple:
                yield _digits(multiple)
            waiting += node.values()
        elif isinstance(node, list):
            waiting += node


def _digits(number: float) -> int:
    digits = "".join(map(str, Decimal(repr(number)).as_tuple().digits)).rstrip("0")
    return int(digits[:18] or "0")  # one that is longer is too large anyway
