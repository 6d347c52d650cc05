"""Names: task ids, aliases, and references such as `sentiment@live`, `sentiment@3`.

A task id is a directory's name too, so the rule leaves nothing to escape with: no slash, no
leading dot, no capitals (which collide on case-insensitive file systems).
"""

import re
from dataclasses import dataclass

from app.errors import InvalidRequest

DEFAULT_ALIAS = "live"
MAX_TASK_ID = 128
MAX_ALIAS = 64
_NAME = re.compile(r"[a-z0-9]+([._-][a-z0-9]+)*")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_DIGITS = re.compile(r"[0-9]+")
_RULE = "lower-case letters and digits, joined by single '.', '_' or '-'"


@dataclass(frozen=True, slots=True)
class Reference:
    """A parsed reference; exactly one of alias, version and digest is given."""

    task_id: str
    alias: str | None = None
    version: int | None = None
    digest: str | None = None


def parse_reference(text: str) -> Reference:
    """Parse `task`, `task@alias`, `task@3` or `task@sha256:...`. Raise InvalidRequest."""
    task_id, at, rest = text.partition("@")
    check_task_id(task_id)
    if not at:
        return Reference(task_id, alias=DEFAULT_ALIAS)
    if match := _DIGEST.fullmatch(rest):
        return Reference(task_id, digest=match[1])
    if _VERSION.fullmatch(rest):
        return Reference(task_id, version=int(rest))
    check_alias(rest)
    return Reference(task_id, alias=rest)


def check_task_id(task_id: str) -> str:
    """Return the id, or raise InvalidRequest that states the rule."""
    if not is_task_id(task_id):
        raise InvalidRequest(
            f"A task id is {_RULE}, at most {MAX_TASK_ID} characters: for example 'sentiment-v2.de'",
            param="task_id",
        )
    return task_id


def is_task_id(text: str) -> bool:
    """Return whether `text` is a well-formed task id."""
    return len(text) <= MAX_TASK_ID and _NAME.fullmatch(text) is not None


def check_alias(alias: str) -> str:
    """Return the alias, or raise InvalidRequest. Digits alone name a version; `none` means no alias."""
    well_formed = len(alias) <= MAX_ALIAS and _NAME.fullmatch(alias) is not None
    if not well_formed or _DIGITS.fullmatch(alias) or alias == "none":
        raise InvalidRequest(
            f"An alias is {_RULE}, at most {MAX_ALIAS} characters, not digits alone, not 'none'; "
            "a reference is task, task@alias, task@3 or task@sha256:<64 hex digits>",
            param="alias",
        )
    return alias
