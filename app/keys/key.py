"""A key as the server knows it: its hash and its name, what it may do, how often; and the rules for each."""

import base64
import hashlib
import re
import secrets
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, PlainValidator, with_config

from app.strict_json import excerpt
from app.validation import Must

PREFIX = "ppx_"
MAX_PER_MINUTE = 1_000_000_000
_NUM_BYTES = 32
_TEXT = re.compile(PREFIX + r"[A-Za-z0-9_-]{43}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_PATTERN = re.compile(r"[\x21-\x3f\x41-\x7e]{1,256}")  # no @
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Scope(StrEnum):
    """What a key may be used for. No scope implies another."""

    GENERATE = "generate"
    UPLOAD = "upload"
    ADMIN = "admin"
    METRICS = "metrics"
    TRAIN = "train"


def _check_name(name: str) -> str:
    if _NAME.fullmatch(name) is None:
        raise ValueError(
            f"{excerpt(name)} can't be a key's name: letters and digits, then also . _ @ -, at most 64 in all"
        )
    return name


def _check_sha256(digest: str) -> str:
    if _SHA256.fullmatch(digest) is None:
        raise ValueError(
            "sha256 must be 64 lower-case hex digits, the hash of a key and not the key itself; "
            "`promptplex keys add` writes it"
        )
    return digest


def _check_scopes(value: Any) -> frozenset[Scope]:
    known = ", ".join(Scope)
    if not isinstance(value, list) or not value:
        raise ValueError(f"scopes must be a list of one or more of {known}")
    for each in value:
        if not isinstance(each, str) or each not in set(Scope):
            raise ValueError(f"there is no scope {excerpt(str(each))}; the scopes are {known}")
    return frozenset(Scope(each) for each in value)


def _check_tasks(value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not value or not all(isinstance(each, str) for each in value):
        raise ValueError("tasks must be a list of patterns; leave it out for all tasks")
    for each in value:
        if _PATTERN.fullmatch(each) is None:
            raise ValueError(
                f"{excerpt(each)} is no pattern of task ids; write it as 'sentiment', 'team-a-*' or '*', "
                "without version or alias"
            )
    return tuple(value)


_Text = Annotated[str, Must("must be text")]
_Quota = Annotated[
    int | None,
    Field(strict=True, ge=1, le=MAX_PER_MINUTE),
    Must(f"must be a whole number from 1 to {MAX_PER_MINUTE}; leave it out for no bound"),
]


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key. The key itself is nowhere: only its sha256 is kept."""

    name: Annotated[_Text, AfterValidator(_check_name)]
    sha256: Annotated[_Text, AfterValidator(_check_sha256)]  # of the key's text, 64 hex digits
    scopes: Annotated[frozenset[Scope], PlainValidator(_check_scopes)]
    # Patterns of task ids and the base's name; None: all.
    tasks: Annotated[tuple[str, ...] | None, PlainValidator(_check_tasks)] = None
    requests_per_minute: _Quota = None
    tokens_per_minute: _Quota = None  # prompt and generated tokens together
    created: _Text = ""  # an ISO date, for people

    def may_use(self, name: str) -> bool:
        """Whether a task, or the base model, is among those that the key was given."""
        return self.tasks is None or any(fnmatchcase(name, pattern) for pattern in self.tasks)


def new_key_text() -> str:
    """Return a new key: 256 random bits, so that a plain hash of it gives nothing away."""
    return PREFIX + base64.urlsafe_b64encode(secrets.token_bytes(_NUM_BYTES)).decode().rstrip("=")


def is_key_text(text: str) -> bool:
    """Whether `text` has the form of a key."""
    return _TEXT.fullmatch(text) is not None


def hash_of(text: str) -> str:
    """Return the sha256 by which a key is known."""
    return hashlib.sha256(text.encode()).hexdigest()
