"""Constraints of an answer (a JSON schema, a regex, one of some texts), and their grammars.

The text of a grammar is llguidance's own. Objects are written as Python's `json.dumps` writes them, with
one space after each comma and colon and none elsewhere: where white space is free, a weak model goes on
with it for ever.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from llguidance import LLMatcher

from app.errors import InvalidRequest
from app.serving.publishing.task_settings import MAX_CHOICE_CHARS, MAX_CHOICES
from app.serving.structured_output.json_schemas import schema_text
from app.text.template import check_unicode

MAX_REGEX_CHARS = 16_384
_SPACE_FIRST = "start: SPACE? @answer\nSPACE: /[ \\n]{1,2}/"


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


def grammar_of(constraint: Constraint, *, goes_on: bool = False) -> str:
    """Return the grammar's text; the compiler decides whether it can be followed. Raise InvalidRequest.

    `goes_on`: the answer follows a marker that the model wrote, so white space may come first.
    """
    write = {
        ConstraintKind.JSON_SCHEMA: _json_schema,
        ConstraintKind.REGEX: _regex,
        ConstraintKind.CHOICE: _choice,
    }[constraint.kind]
    grammar = write(constraint.value, constraint.param)
    return _after_space(grammar) if goes_on else grammar


def _after_space(grammar: str) -> str:
    is_lark = not grammar.startswith("{")
    inner = {"lark_grammar": grammar} if is_lark else json.loads(grammar)["grammars"][0]
    return json.dumps({"grammars": [{"lark_grammar": _SPACE_FIRST}, {**inner, "name": "answer"}]})


def _regex(pattern: Any, param: str) -> str:
    if not isinstance(pattern, str) or not 1 <= len(pattern) <= MAX_REGEX_CHARS:
        raise InvalidRequest(f"{param} must be a regex of 1 to {MAX_REGEX_CHARS} characters.", param=param)
    check_unicode(pattern, param)
    return LLMatcher.grammar_from_regex(pattern)


def _choice(texts: Sequence[Any], param: str) -> str:
    valid = all(isinstance(text, str) and 1 <= len(text) <= MAX_CHOICE_CHARS for text in texts)
    if not valid or not 1 <= len(texts) <= MAX_CHOICES:
        raise InvalidRequest(
            f"{param} must be a list of 1 to {MAX_CHOICES} strings of 1 to {MAX_CHOICE_CHARS} characters.",
            param=param,
        )
    check_unicode("".join(texts), param)
    return LLMatcher.grammar_from_lark(f"start: {' | '.join(map(_literal, dict.fromkeys(texts)))}")


def _literal(text: str) -> str:
    """Return a string of llguidance's grammar language: with JSON's escapes, without control characters."""
    return '"' + "".join(c if c.isprintable() and c not in '"\\' else _escaped(c) for c in text) + '"'


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else character


def _json_schema(schema: Any, param: str) -> str:
    text = schema_text(schema, param)
    check_unicode(text, param)
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
