"""Keys as entries of a key file: strict to read, since a misread entry would let the wrong clients in."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from pydantic import TypeAdapter, ValidationError

from app.keys.key import Key, Scope
from app.strict_json import JsonError, excerpt, parse_json
from app.validation import PLAIN

FORMAT = 1
_KEY = TypeAdapter(Key)


class KeyFileError(ValueError):
    """What is wrong with a key file, and what to do; the message is for the operator."""


def parse_keys(data: bytes) -> tuple[Key, ...]:
    """Return the keys of a file. Raises KeyFileError."""
    try:
        value = parse_json(data)
    except JsonError as error:
        raise KeyFileError(str(error)) from None
    if not isinstance(value, dict) or set(value) != {"format", "keys"}:
        raise KeyFileError(
            'it must be {"format": 1, "keys": [...]}; `promptplex keys add` writes such a file'
        )
    if value["format"] != FORMAT or isinstance(value["format"], bool):
        raise KeyFileError(f"its format is not {FORMAT}, the only one that this version knows")
    if not isinstance(value["keys"], list):
        raise KeyFileError("its keys must be a list")
    keys = tuple(_numbered(number, entry) for number, entry in enumerate(value["keys"], 1))
    _refuse_twice("name", (key.name for key in keys))
    _refuse_twice("sha256", (key.sha256 for key in keys))
    return keys


def format_keys(keys: Iterable[Key]) -> bytes:
    """Return a file's bytes, one key to a line, so that a person may read them and diff them."""
    entries = ",\n".join(f"  {json.dumps(_entry(key))}" for key in keys)
    return f'{{"format": {FORMAT}, "keys": [\n{entries}\n]}}\n'.encode()


def check_key(entry: Any) -> Key:
    """Return the key of an entry. Raises KeyFileError that names the first field at fault."""
    try:
        key = _KEY.validate_python(entry)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
        raise KeyFileError(
            _describe(min(problems, key=lambda problem: _RANK.get(problem["type"], 2)))
        ) from None
    if key.tasks is not None and Scope.METRICS in key.scopes:
        raise KeyFileError(
            "the scope 'metrics' shows figures of all tasks, so such a key can't be limited to some tasks; "
            "make two keys: one with metrics alone, one with the other scopes and the tasks"
        )
    return key


_RANK = {"unexpected_keyword_argument": 0, "missing": 1}  # the order in which problems are reported


def _describe(problem: Mapping[str, Any]) -> str:
    kind, name = problem["type"], problem["loc"][0] if problem["loc"] else ""
    if kind == "dataclass_type":
        return "it must be an object"
    if kind == "unexpected_keyword_argument":
        known = ", ".join(field.name for field in fields(Key))
        return f"it has the unknown field {excerpt(name)}; the fields are {known}"
    if kind == "missing":
        return f"it has no {name}"
    return f"{name} {problem['msg']}" if kind == PLAIN else str(problem["ctx"]["error"])


def _numbered(number: int, entry: Any) -> Key:
    try:
        return check_key(entry)
    except KeyFileError as error:
        raise KeyFileError(f"key {number}: {error}") from None


def _refuse_twice(what: str, values: Iterable[str]) -> None:
    seen: set[str] = set()
    for value in values:
        if value in seen:
            raise KeyFileError(f"two keys have the {what} {value}; remove one of them")
        seen.add(value)


def _entry(key: Key) -> dict[str, Any]:
    given = {field.name: getattr(key, field.name) for field in fields(Key)} | {"scopes": sorted(key.scopes)}
    return {name: value for name, value in given.items() if value not in (None, "")}
