"""Marks beside a task's records, which show when a record is lost.

    tasks/<task>/heads/release-7-<sha256>     release 7 was there, with these bytes
    tasks/<task>/heads/version-4-<sha256>

No record names the last release, nor a version without a release, so a process that reads the task afresh
would not notice their loss. A mark is an empty file, made when its record is durable and before the record
is acknowledged. A crash between the two leaves a record without a mark, which is harmless; a mark without
its record shows that the record was lost. Tasks of older stores have no marks until a server opens them.
"""

import logging
import re

from app.errors import CorruptData, PromptplexError
from app.prompt import TaskVersion
from app.store.files import DurableFiles, Name
from app.store.releases import Release, TaskHistory

_log = logging.getLogger(__name__)
FOLDER = "heads"
_MARK = re.compile(r"(release|version)-([1-9][0-9]{0,8})-([0-9a-f]{64})")
_Marks = set[tuple[str, int, str]]  # kind of record, number, sha256
_Record = Release | TaskVersion


def mark(files: DurableFiles, record: _Record) -> None:
    """Mark a durable record, so that its loss will be noticed.

    The record counts all the same where that fails: it is visible already, and the next server that opens
    the store marks it.
    """
    try:
        if not files.exists(_mark_name(record)):
            files.mark(_mark_name(record))
    except PromptplexError as error:
        _log.warning("%s was written, but its mark was not: %s", "/".join(_mark_name(record)), error)


def mark_newest(files: DurableFiles, history: TaskHistory) -> None:
    """Make missing marks of a task's newest records; the loss of older ones shows by the gap they leave."""
    newest: tuple[_Record, ...] = (*history.versions[-1:], *history.releases[-1:])
    for record in newest:
        mark(files, record)


def read_marks(files: DurableFiles, task_id: str) -> _Marks:
    """Return all marks of a task. Call it before its records are read: newer ones have no mark here."""
    matches = (_MARK.fullmatch(name) for name in files.names(marks_name(task_id)))
    return {(match[1], int(match[2]), match[3]) for match in matches if match is not None}


def check_marks(history: TaskHistory, marks: _Marks) -> None:
    """Raise CorruptData where a record that was there is gone, or is another one now."""
    found = {(kind, number): digest for kind, number, digest in _records(history)}
    for kind, number, digest in sorted(marks):
        if (kind, number) not in found:
            raise CorruptData(
                f"Task {history.task_id!r} has lost its {kind} {number}: restore it from a backup, or from a "
                "replica that still runs; docs/store.md says how to go on without it"
            )
        if found[kind, number] != digest:
            raise CorruptData(
                f"The past of task {history.task_id!r} was changed: {kind} {number} was lost, and its number "
                "claimed anew"
            )


def _records(history: TaskHistory) -> _Marks:
    return {*map(_describe, history.versions), *map(_describe, history.releases)}


def _describe(record: _Record) -> tuple[str, int, str]:
    if isinstance(record, Release):
        return "release", record.number, record.digest
    return "version", record.version, record.digest


def _mark_name(record: _Record) -> Name:
    kind, number, digest = _describe(record)
    return (*marks_name(record.task_id), f"{kind}-{number}-{digest}")


def marks_name(task_id: str) -> Name:
    """Return the folder of a task's marks."""
    return ("tasks", task_id, FOLDER)
