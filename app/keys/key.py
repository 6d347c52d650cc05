"""A key as the server knows it: its hash and its name, what it may do, how often."""

import base64
import hashlib
import re
import secrets
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase

PREFIX = "ppx_"
_NUM_BYTES = 32
_TEXT = re.compile(PREFIX + r"[A-Za-z0-9_-]{43}")


class Scope(StrEnum):
    """What a key may be used for. No scope implies another."""

    GENERATE = "generate"
    UPLOAD = "upload"
    ADMIN = "admin"
    METRICS = "metrics"


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key. The key itself is nowhere: only its sha256 is kept."""

    name: str
    sha256: str  # of the key's text, 64 hex digits
    scopes: frozenset[Scope]
    tasks: tuple[str, ...] | None = None  # patterns of task ids and the base's name; None: all
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # prompt and generated tokens together
    created: str = ""  # an ISO date, for people

    def may_use(self, name: str) -> bool:
        """Whether a task, or the base model, is among those that the key was given."""
        return self.tasks is None or any(fnmatchcase(name, pattern) for pattern in self.tasks)


def new_key_text() -> str:
    """A new key: 256 random bits, so a plain hash of it tells nobody anything."""
    return PREFIX + base64.urlsafe_b64encode(secrets.token_bytes(_NUM_BYTES)).decode().rstrip("=")


def is_key_text(text: str) -> bool:
    """Whether `text` has the form of a key."""
    return _TEXT.fullmatch(text) is not None


def hash_of(text: str) -> str:
    """The sha256 by which a key is known."""
    return hashlib.sha256(text.encode()).hexdigest()
