"""Keys as entries of a key file: strict to read, since what is misread there lets somebody in."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from app.keys.key import Key, Scope
from app.strict_json import JsonError, excerpt, parse_json

FORMAT = 1
MAX_PER_MINUTE = 1_000_000_000
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_PATTERN = re.compile(r"[\x21-\x3f\x41-\x7e]{1,256}")  # no @
_SHA256 = re.compile(r"[0-9a-f]{64}")
_REQUIRED = ("name", "sha256", "scopes")
_OPTIONAL = ("tasks", "requests_per_minute", "tokens_per_minute", "created")


class KeyFileError(ValueError):
    """What is wrong with a key file, and what to do; the message is for the operator."""


def parse_keys(data: bytes) -> tuple[Key, ...]:
    """The keys of a file. Raises KeyFileError."""
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
    keys = tuple(_key(number, entry) for number, entry in enumerate(value["keys"], 1))
    _refuse_twice("name", (key.name for key in keys))
    _refuse_twice("sha256", (key.sha256 for key in keys))
    return keys


def format_keys(keys: Iterable[Key]) -> bytes:
    """The file's bytes, one key to a line, so that a person may read them and diff them."""
    entries = ",\n".join(f"  {json.dumps(_entry(key))}" for key in keys)
    return f'{{"format": {FORMAT}, "keys": [\n{entries}\n]}}\n'.encode()


def check_name(name: str) -> str:
    """Return a key's name, or raise KeyFileError that states the rule."""
    if _NAME.fullmatch(name) is None:
        raise KeyFileError(
            f"{excerpt(name)} can't be a key's name: letters and digits, then also . _ @ -, at most 64 in all"
        )
    return name


def check_pattern(pattern: str) -> str:
    """Return a pattern of task ids, or raise KeyFileError."""
    if _PATTERN.fullmatch(pattern) is None:
        raise KeyFileError(
            f"{excerpt(pattern)} is no pattern of task ids; write it as 'sentiment', 'team-a-*' or '*', "
            "without version or alias"
        )
    return pattern


def check_reach(scopes: frozenset[Scope], tasks: tuple[str, ...] | None) -> None:
    """Raise KeyFileError where patterns of tasks promise a bound that a scope doesn't have."""
    if tasks is not None and Scope.METRICS in scopes:
        raise KeyFileError(
            "the scope metrics tells of all tasks, so a key that has it can't be bound to some; make two "
            "keys: one with metrics alone, one with the other scopes and the tasks"
        )


def _key(number: int, entry: Any) -> Key:
    where = f"key {number}"
    if not isinstance(entry, dict):
        raise KeyFileError(f"{where} must be an object")
    if unknown := sorted(set(entry) - {*_REQUIRED, *_OPTIONAL}):
        raise KeyFileError(
            f"{where} has the unknown field {excerpt(unknown[0])}; the fields are "
            f"{', '.join((*_REQUIRED, *_OPTIONAL))}"
        )
    if missing := [name for name in _REQUIRED if name not in entry]:
        raise KeyFileError(f"{where} has no {missing[0]}")
    scopes, tasks = _scopes(entry["scopes"], where), _tasks(entry.get("tasks"), where)
    try:
        check_reach(scopes, tasks)
    except KeyFileError as error:
        raise KeyFileError(f"{where}: {error}") from None
    return Key(
        name=_text(entry, "name", where, check_name),
        sha256=_text(entry, "sha256", where, _check_sha256),
        scopes=scopes,
        tasks=tasks,
        requests_per_minute=_quota(entry, "requests_per_minute", where),
        tokens_per_minute=_quota(entry, "tokens_per_minute", where),
        created=_text(entry, "created", where) if "created" in entry else "",
    )


def _text(
    entry: Mapping[str, Any], name: str, where: str, check: Callable[[str], str] = lambda text: text
) -> str:
    value = entry[name]
    if not isinstance(value, str):
        raise KeyFileError(f"{where}: {name} must be text")
    try:
        return check(value)
    except KeyFileError as error:
        raise KeyFileError(f"{where}: {error}") from None


def _check_sha256(digest: str) -> str:
    if _SHA256.fullmatch(digest) is None:
        raise KeyFileError(
            "sha256 must be 64 lower-case hex digits, the hash of a key and not the key itself; "
            "`promptplex keys add` writes it"
        )
    return digest


def _scopes(value: Any, where: str) -> frozenset[Scope]:
    known = ", ".join(Scope)
    if not isinstance(value, list) or not value:
        raise KeyFileError(f"{where}: scopes must be a list of one or more of {known}")
    for each in value:
        if not isinstance(each, str) or each not in set(Scope):
            raise KeyFileError(f"{where}: there is no scope {excerpt(str(each))}; the scopes are {known}")
    return frozenset(Scope(each) for each in value)


def _tasks(value: Any, where: str) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not value or not all(isinstance(each, str) for each in value):
        raise KeyFileError(f"{where}: tasks must be a list of patterns; leave it out for all tasks")
    try:
        return tuple(check_pattern(each) for each in value)
    except KeyFileError as error:
        raise KeyFileError(f"{where}: {error}") from None


def _quota(entry: Mapping[str, Any], name: str, where: str) -> int | None:
    value = entry.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_PER_MINUTE:
        raise KeyFileError(
            f"{where}: {name} must be a whole number from 1 to {MAX_PER_MINUTE}; leave it out for no bound"
        )
    return value


def _refuse_twice(what: str, values: Iterable[str]) -> None:
    seen: set[str] = set()
    for value in values:
        if value in seen:
            raise KeyFileError(f"two keys have the {what} {value}; remove one of them")
        seen.add(value)


def _entry(key: Key) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": key.name, "sha256": key.sha256, "scopes": sorted(key.scopes)}
    given = {
        "tasks": None if key.tasks is None else list(key.tasks),
        "requests_per_minute": key.requests_per_minute,
        "tokens_per_minute": key.tokens_per_minute,
        "created": key.created or None,
    }
    return entry | {name: value for name, value in given.items() if value is not None}
