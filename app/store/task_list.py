"""The ids of all tasks, found by one `stat` of a directory, however many there are.

The directory's time of change shows whether any process has added or removed a task since it was
listed. File systems count time in ticks, so a listing counts only when the last change lay well before it.
"""

import threading
from collections.abc import Callable

from app.store.files import DurableFiles, Stamp
from app.store.references import is_task_id

_FOLDER = ("tasks",)


class TaskList:
    """The ids of all tasks, sorted. Thread-safe."""

    def __init__(self, files: DurableFiles, has_records: Callable[[str], bool]) -> None:
        """`has_records` returns whether a folder has become a task."""
        self._files = files
        self._has_records = has_records
        self._lock = threading.Lock()  # guards the fields, never held across I/O
        self._stamp: Stamp | None = None  # of the listing; None: list again
        self._ids: tuple[str, ...] = ()
        self._empty: frozenset[str] = frozenset()  # folders without records; they may get some any time

    def ids(self) -> tuple[str, ...]:
        """Return the ids as of now: one `stat`, and one more for each folder without records."""
        stamp = self._files.stamp(_FOLDER)
        with self._lock:
            known, empty, listed = self._ids, self._empty, self._stamp
        if stamp is None or stamp != listed:
            names = {name for name in self._files.names(_FOLDER) if is_task_id(name)}
            kept = names.intersection(known)
            return self._found(kept, names - kept, stamp if stamp is not None and stamp.is_settled else None)
        if any(self._has_records(name) for name in empty):
            return self._found(set(known), set(empty), stamp)
        return known

    def _found(self, known: set[str], new: set[str], stamp: Stamp | None) -> tuple[str, ...]:
        filled = {name for name in new if self._has_records(name)}
        ids = known | filled
        with self._lock:
            if ids != set(self._ids):  # the same object as long as nothing has changed
                self._ids = tuple(sorted(ids))
            self._empty = frozenset(new - filled)
            self._stamp = stamp
            return self._ids
