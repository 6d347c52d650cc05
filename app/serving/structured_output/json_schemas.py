"""Checks of a JSON schema before llguidance sees it, which ignores keywords that it doesn't know.

Accepted: known keywords, references within the document, texts of bounded length, bounded remainders.
"""

import difflib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any
from urllib.parse import unquote

from app.errors import InvalidRequest
from app.serving.structured_output.closed_schemas import TooMuchToClose, closed

MAX_SCHEMA_CHARS = 65_536
MAX_CLOSED_CHARS = 16 * MAX_SCHEMA_CHARS  # of the same schema with its objects closed
MAX_LITERAL_CHARS = 4_096  # of one text; what is left of it costs every mask
# llguidance works out remainders by every multiple at once, which none of its own limits bound.
MAX_MULTIPLE = 10_000

# Where schemas stand, as far as llguidance takes them.
_MAPS_OF_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS_OF_SCHEMAS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_SCHEMAS = ("items", "additionalItems", "additionalProperties")
# Those that llguidance can't hold an answer to are among them: it refuses them by name. The last two lines
# say nothing of the answer; `discriminator` and `example` are OpenAPI's.
_KEYWORDS = """
    type enum const multipleOf maximum exclusiveMaximum minimum exclusiveMinimum maxLength minLength pattern
    format maxItems minItems uniqueItems maxContains minContains maxProperties minProperties required
    dependentRequired dependencies dependentSchemas allOf anyOf oneOf not if then else properties
    patternProperties additionalProperties unevaluatedProperties propertyNames items prefixItems
    additionalItems unevaluatedItems contains $defs definitions $ref $dynamicRef $dynamicAnchor
    $recursiveRef $recursiveAnchor $anchor $id $schema
    $comment title description default examples example deprecated readOnly writeOnly discriminator
"""
_KNOWN = frozenset(_KEYWORDS.split())
_ENCODER = json.JSONEncoder(allow_nan=False, ensure_ascii=False)


def schema_text(schema: Any, param: str) -> str:
    """Return a schema, given as an object or as its text, with its objects closed. Raise InvalidRequest."""
    too_long = InvalidRequest(
        f"{param} is too long: at most {MAX_SCHEMA_CHARS} characters as JSON are accepted.", param=param
    )
    if _is_huge(schema):
        raise too_long
    text = schema if isinstance(schema, str) else _written(schema, param)
    if len(text) > MAX_SCHEMA_CHARS:
        raise too_long
    read = _read(text, param)
    if not isinstance(read, Mapping):
        raise InvalidRequest(f"{param} must be a JSON schema, which is an object.", param=param)
    common = 1
    for each in _schemas(read, param):
        _check(each, each is read, param)
        common = math.lcm(common, _multiple(each))
        if common > MAX_MULTIPLE:
            raise InvalidRequest(
                f"{param}: the least common multiple of the schema's multipleOf (without trailing zeros) "
                f"exceeds {MAX_MULTIPLE}; leave some out, or check the answer yourself.",
                param=param,
            )
    return _closed(read, param)


def _is_huge(schema: Any) -> bool:
    """Return whether its texts and parts alone are too long, without writing them out."""
    size, left = 0, [schema]
    while left and size <= MAX_SCHEMA_CHARS:
        part = left.pop()
        if isinstance(part, str | list | Mapping):
            size += len(part)
        if isinstance(part, list | Mapping) and size <= MAX_SCHEMA_CHARS:
            left += [*part, *part.values()] if isinstance(part, Mapping) else part
    return size > MAX_SCHEMA_CHARS


def _closed(read: Mapping[str, Any], param: str) -> str:
    try:
        document = closed(read, lambda reference: _target(read, reference, param))
        return "".join(_bounded(_ENCODER.iterencode(document)))
    except (TooMuchToClose, RecursionError):
        raise InvalidRequest(
            f"{param} is nested too deeply, or puts objects together of too many parts with too many names; "
            "simplify it.",
            param=param,
        ) from None
    except ValueError:
        raise InvalidRequest(f"{param} holds NaN, or an infinite number.", param=param) from None


def _bounded(parts: Iterable[str]) -> Iterator[str]:
    """Pass the parts on while they are few: closed objects repeat names, and references their targets."""
    size = 0
    for part in parts:
        size += len(part)
        if size > MAX_CLOSED_CHARS:
            raise TooMuchToClose
        yield part


def _written(value: Any, param: str) -> str:
    try:
        return json.dumps(value, allow_nan=False, ensure_ascii=False)
    except (ValueError, RecursionError):
        raise InvalidRequest(f"{param} is nested too deeply, or holds NaN.", param=param) from None


def _read(text: str, param: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidRequest(f"{param} must be a JSON schema: an object, or its text.", param=param) from None


def _schemas(root: Mapping[str, Any], param: str) -> Iterator[Mapping[str, Any]]:
    """Yield every schema of the document once: where schemas stand, and where references lead."""
    waiting: list[Any] = [root]
    seen: set[int] = set()
    while waiting:
        schema = waiting.pop()
        if not isinstance(schema, Mapping) or id(schema) in seen:
            continue
        seen.add(id(schema))
        yield schema
        waiting += _parts(schema)
        if "$ref" in schema:
            waiting.append(_target(root, schema["$ref"], param))


def _parts(schema: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the schemas that stand in a schema."""
    yield from (schema.get(word) for word in _SCHEMAS)
    for word in _LISTS_OF_SCHEMAS:
        if isinstance(schema.get(word), list):
            yield from schema[word]
    for word in _MAPS_OF_SCHEMAS:
        if isinstance(schema.get(word), Mapping):
            yield from schema[word].values()


def _target(root: Any, reference: Any, param: str) -> Any:
    is_within = isinstance(reference, str) and (reference == "#" or reference.startswith("#/"))
    if not is_within or "%2f" in reference.lower():
        raise InvalidRequest(
            f"{param}: a $ref leads within the document, as '#/$defs/name' does; others are not followed.",
            param=param,
        )
    node = root
    for step in reference.split("/")[1:]:
        name = unquote(step).replace("~1", "/").replace("~0", "~")
        if isinstance(node, Mapping) and name in node:
            node = node[name]
        elif isinstance(node, list) and name.isdecimal() and int(name[:9]) < len(node):
            node = node[int(name)]
        else:
            raise InvalidRequest(f"{param}: the $ref {reference[:100]!r} leads nowhere.", param=param)
    return node


def _check(schema: Mapping[str, Any], is_root: bool, param: str) -> None:
    for word in schema:
        if word not in _KNOWN and (word == "x-guidance" or not word.startswith("x-")):
            raise InvalidRequest(f"{param}: {_unknown(word)}", param=param)
    if "$id" in schema and not is_root:
        raise InvalidRequest(f"{param}: $id may stand at the top of the schema only.", param=param)
    least = schema.get("minProperties")
    if isinstance(least, int | float) and least > 1:
        raise InvalidRequest(
            f"{param}: minProperties above 1 is not supported, since a key may come twice; name the "
            "properties, and require them.",
            param=param,
        )
    if any(len(text) > MAX_LITERAL_CHARS for text in _texts(schema, param)):
        raise InvalidRequest(
            f"{param}: a constant, a name, or a pattern in it has more than {MAX_LITERAL_CHARS} characters.",
            param=param,
        )


def _unknown(word: str) -> str:
    close = difflib.get_close_matches(word, _KNOWN, 1, 0.75)
    hint = f"did you mean {close[0]!r}?" if close else "leave it out, or check the answer yourself."
    return f"{word[:100]!r} is no keyword that an answer can be held to; {hint}"


def _texts(schema: Mapping[str, Any], param: str) -> Iterator[str]:
    """Yield what the answer would have to spell, and patterns."""
    if "const" in schema:
        yield _written(schema["const"], param)
    if isinstance(schema.get("enum"), list):
        yield from (_written(value, param) for value in schema["enum"])
    for word in ("properties", "patternProperties"):
        if isinstance(schema.get(word), Mapping):
            yield from schema[word]
    if isinstance(schema.get("required"), list):
        yield from (name for name in schema["required"] if isinstance(name, str))
    if isinstance(schema.get("pattern"), str):
        yield schema["pattern"]


def _multiple(schema: Mapping[str, Any]) -> int:
    """Return the significant digits of its multipleOf as a whole number; 1 where there is none."""
    number = schema.get("multipleOf")
    if isinstance(number, bool) or not isinstance(number, int | float) or not number:
        return 1
    digits = "".join(map(str, Decimal(repr(number)).as_tuple().digits)).rstrip("0")
    return int(digits[:18] or "1")  # one that is longer is too large anyway
