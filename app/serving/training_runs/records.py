"""What this server knows of a run, in a file: who asked for what, how far it came, what became of it."""

import datetime
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field
from typing_extensions import TypedDict

from app.errors import CorruptData
from app.strict_json import JsonError, parse_json
from app.validation import closed

_ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{8}")


@closed
class PublishedRow(TypedDict):
    """The version that a run made."""

    version: int
    version_digest: str
    release: Annotated[int | None, Field(description="That points `candidate` at it; null: it did already")]


class RunState(StrEnum):
    """How far a run came."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"  # its server ended before it did

    @property
    def has_ended(self) -> bool:
        """Whether it stays so."""
        return self not in (RunState.QUEUED, RunState.RUNNING)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """One run, as of its last change."""

    id: str
    task_id: str
    who: str  # asked for it
    tenant: str  # the key's name; "" where there are no keys
    settings: Mapping[str, Any]  # as they were sent
    task: Mapping[str, Any]  # the `task` part of the version to be
    init_from: str | None = None  # the version, with its number
    files: Mapping[str, int]  # bytes of each data file
    created_at: str
    state: RunState = RunState.QUEUED
    started_at: str | None = None
    ended_at: str | None = None
    error: str | None = None  # why it failed
    published: PublishedRow | None = None
    publish: bool = True

    def begun(self) -> "RunRecord":
        """Return it as it begins to run."""
        return replace(self, state=RunState.RUNNING, started_at=now())

    def ended(self, state: RunState, **changes: Any) -> "RunRecord":
        """Return it as it ends."""
        return replace(self, state=state, ended_at=now(), **changes)


def new_run_id() -> str:
    """Return an id that sorts by time."""
    return f"{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(4)}"


def is_run_id(text: str) -> bool:
    """Whether it has the form of a run's id, which names a directory."""
    return _ID.fullmatch(text) is not None


def now() -> str:
    """Return the time, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def dump_record(record: RunRecord) -> bytes:
    """Return a record's bytes."""
    return json.dumps(asdict(record), ensure_ascii=False, indent=1).encode()


def parse_record(data: bytes) -> RunRecord:
    """Return the record of a file. Raise CorruptData."""
    try:
        fields = parse_json(data)
        return RunRecord(**fields | {"state": RunState(fields["state"])})
    except (JsonError, TypeError, KeyError, ValueError):
        raise CorruptData("the record of a training run can't be read") from None
