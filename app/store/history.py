"""Reading tasks' histories: verified, cached, and exact across processes.

Histories only grow, so a cached one stays true; one `lstat` of release n + 1 shows whether another
process has moved on. That is linearizable on a local file system. (NFS caches attributes: there a
replica may serve the old release for as long as `acdirmax`, 60 s by default, unless it is mounted with
`noac` or `lookupcache=none`.)
"""

import hashlib
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from app.caching import LruCache
from app.errors import CorruptData
from app.prompt import TaskVersion
from app.store.files import DurableFiles, Name
from app.store.heads import check_marks, marks_name, read_marks
from app.store.manifests import MAX_MANIFEST_BYTES, decode_version, settings_of
from app.store.releases import (
    MAX_RELEASE_BYTES,
    Present,
    Release,
    TaskHistory,
    decode_release,
    verify_manifests,
)
from app.store.task_list import TaskList

_NUMBERED = re.compile(r"([1-9][0-9]{0,8})\.json")


MAX_RECORDS = 50_000  # of histories in memory, beside the newest one


@dataclass(slots=True)
class _Known:
    """A history, and its versions by their settings."""

    history: TaskHistory
    by_settings: dict[bytes, int] = field(default_factory=dict)
    num_indexed: int = 0

    @property
    def num_records(self) -> int:
        return len(self.history.versions) + len(self.history.releases)


class HistoryReader:
    """Histories of all tasks. Thread-safe.

    Whole histories are kept within a bound, the least recently used ones go; aliases and the versions they
    point at are kept of every task that was read.
    """

    def __init__(self, files: DurableFiles, max_records: int = MAX_RECORDS) -> None:
        self._files = files
        self._known: LruCache[str, _Known] = LruCache(max_records, lambda known: known.num_records)
        self._present: dict[str, Present] = {}
        self._lock = threading.Lock()  # guards the fields above; never held across I/O
        self._tasks = TaskList(files, self._has_records)
        self.num_changes = 0  # another number as soon as this process wrote or read something new

    def task_ids(self) -> tuple[str, ...]:
        """Return the ids of all tasks, sorted; damaged ones too."""
        return self._tasks.ids()

    def cached_ids(self) -> list[str]:
        """Return the ids of the tasks with a history in memory, even if their files are gone."""
        with self._lock:
            return list(self._known)

    def note_change(self) -> None:
        """Count a record that this process has written and not read yet."""
        with self._lock:
            self.num_changes += 1

    def forget(self, task_id: str) -> None:
        """Read the task from its files the next time."""
        with self._lock:
            self._known.pop(task_id)
            self._present.pop(task_id, None)
            self.num_changes += 1

    def _has_records(self, task_id: str) -> bool:
        try:
            signs = (version_name(task_id, 1), release_name(task_id, 1), marks_name(task_id))
            return any(self._files.exists(sign) for sign in signs)
        except CorruptData:  # it can't be looked into; reading it says why
            return True

    def cached(self, task_id: str) -> TaskHistory | None:
        """Return the history that was read last, however old, or None."""
        known = self._find(task_id)
        return None if known is None else known.history

    def _find(self, task_id: str) -> _Known | None:
        with self._lock:
            return self._known.get(task_id)

    def current(self, task_id: str) -> Present:
        """Return a task's aliases and their versions as of now: one `lstat`, unless a release came."""
        with self._lock:
            present = self._present.get(task_id)
        if present is None or self._files.exists(release_name(task_id, present.num_releases + 1)):
            return Present.of(self.refresh(task_id))
        return present

    def with_settings(self, history: TaskHistory, settings: bytes) -> TaskVersion | None:
        """Return the first version with these settings, as canonical JSON, or None."""
        known = self._find(history.task_id) or _Known(history)
        for version in history.versions[known.num_indexed :]:
            known.by_settings.setdefault(_digest_of(settings_of(version)), version.version)
            known.num_indexed = max(known.num_indexed, version.version)
        number = known.by_settings.get(_digest_of(settings))
        return None if number is None else history.version(number)

    def refresh(self, task_id: str) -> TaskHistory:
        """Read the records added since the cached history; an unknown task has an empty one."""
        cached = self.cached(task_id)
        if cached is None:
            return self._remember(self.read_afresh(task_id))
        return self._remember(self._read_on(cached))

    def read_afresh(self, task_id: str) -> TaskHistory:
        """Read all of a task from its files. Raise CorruptData."""
        # Listed first: a record that is added meanwhile must not look like a gap.
        marks = read_marks(self._files, task_id)
        last_release, last_version = self._last_numbers(task_id)
        history = self._read_on(TaskHistory(task_id))
        if len(history.releases) < last_release or len(history.versions) < last_version:
            raise CorruptData(f"Task {task_id!r} has a gap: a version or release in the middle is missing")
        check_marks(history, marks)
        return history

    def _read_on(self, known: TaskHistory) -> TaskHistory:
        # Releases first: the versions that a release names were there before it.
        releases = self._read_releases(known)
        versions = self._read_versions(known)
        verify_manifests(releases[len(known.releases) :], versions)
        return TaskHistory(known.task_id, versions, releases)

    def _read_releases(self, known: TaskHistory) -> tuple[Release, ...]:
        found = list(known.releases)
        while (
            data := self._files.read(release_name(known.task_id, len(found) + 1), MAX_RELEASE_BYTES)
        ) is not None:
            previous = found[-1] if found else None
            found.append(decode_release(known.task_id, len(found) + 1, data, previous))
        return tuple(found)

    def _read_versions(self, known: TaskHistory) -> tuple[TaskVersion, ...]:
        found = list(known.versions)
        while (
            data := self._files.read(version_name(known.task_id, len(found) + 1), MAX_MANIFEST_BYTES)
        ) is not None:
            found.append(decode_version(known.task_id, len(found) + 1, data))
        return tuple(found)

    def _last_numbers(self, task_id: str) -> tuple[int, int]:
        """Return the highest release and version by listing, to notice a missing file in the middle."""
        kinds = (self._files.names(("tasks", task_id, kind)) for kind in ("releases", "versions"))
        releases, versions = (_highest(names) for names in kinds)
        return releases, versions

    def _remember(self, history: TaskHistory) -> TaskHistory:
        """Cache a history, unless a longer one is cached, and return the longer one."""
        if not history.versions and not history.releases:
            return history  # not cached: unknown ids must not fill the memory
        with self._lock:
            known = self._known.get(history.task_id) or _Known(TaskHistory(history.task_id))
            before, old = known.num_records, known.history
            known.history = TaskHistory(
                history.task_id,
                max(old.versions, history.versions, key=len),
                max(old.releases, history.releases, key=len),
            )
            if known.num_records != before:
                self._present[history.task_id] = Present.of(known.history)
                self.num_changes += 1
            self._known.put(history.task_id, known)
            return known.history


def _digest_of(settings: bytes) -> bytes:
    return hashlib.sha256(settings).digest()


def version_name(task_id: str, number: int) -> Name:
    """Return the name of a version's manifest."""
    return ("tasks", task_id, "versions", f"{number}.json")


def release_name(task_id: str, number: int) -> Name:
    """Return the name of a release's record."""
    return ("tasks", task_id, "releases", f"{number}.json")


def _highest(names: Sequence[str]) -> int:
    return max((int(match[1]) for name in names if (match := _NUMBERED.fullmatch(name))), default=0)
