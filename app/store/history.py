"""Reading tasks' histories: verified, cached, and exact across processes.

Histories only grow, so a cached one stays true; one `lstat` of release n + 1 tells whether another
process has moved on. That is linearizable on a local file system. (NFS caches attributes: there a
replica may serve the old release for as long as `acdirmax`, 60 s by default, unless it is mounted with
`noac` or `lookupcache=none`.)
"""

import re
import threading
from collections.abc import Sequence

from app.errors import CorruptData
from app.prompt import TaskVersion
from app.store.files import Name, WriteOnceFiles
from app.store.heads import check_marks, read_marks
from app.store.manifests import MAX_MANIFEST_BYTES, decode_version
from app.store.references import is_task_id
from app.store.releases import MAX_RELEASE_BYTES, Release, TaskHistory, decode_release, verify_manifests

_NUMBERED = re.compile(r"([1-9][0-9]{0,8})\.json")


class HistoryReader:
    """What is known of every task. Thread-safe."""

    def __init__(self, files: WriteOnceFiles) -> None:
        self._files = files
        self._histories: dict[str, TaskHistory] = {}
        self._lock = threading.Lock()  # guards the dict only; never held across I/O

    def task_ids(self) -> list[str]:
        """Ids of all tasks, sorted. Damage is found by reading, per task, and hides nothing here."""
        names = sorted(name for name in self._files.names(("tasks",)) if is_task_id(name))
        return [name for name in names if self._has_records(name)]

    def cached_ids(self) -> list[str]:
        """Ids of the tasks that were read before, whatever has become of their files."""
        with self._lock:
            return list(self._histories)

    def forget(self, task_id: str) -> None:
        """Read the task from its files the next time."""
        with self._lock:
            self._histories.pop(task_id, None)

    def _has_records(self, task_id: str) -> bool:
        try:
            known = any(self._files.exists(first(task_id, 1)) for first in (version_name, release_name))
            return known or bool(read_marks(self._files, task_id))
        except CorruptData:  # it can't be looked into; whoever asks for it is told why
            return True

    def cached(self, task_id: str) -> TaskHistory | None:
        """What was read last, however old."""
        with self._lock:
            return self._histories.get(task_id)

    def current(self, task_id: str) -> TaskHistory:
        """As of now for aliases and retirement; versions that no release names may be missing."""
        history = self.cached(task_id)
        if history is None or self._files.exists(release_name(task_id, len(history.releases) + 1)):
            return self.refresh(task_id)
        return history

    def refresh(self, task_id: str) -> TaskHistory:
        """Read what was added since the cached history; an unknown task has an empty one."""
        cached = self.cached(task_id)
        if cached is None:
            return self._remember(self.read_afresh(task_id))
        return self._remember(self._read_on(cached))

    def read_afresh(self, task_id: str) -> TaskHistory:
        """All of it from the files, whatever is cached. Raises CorruptData."""
        # Listed first: what is added meanwhile must not look like a gap.
        marks = read_marks(self._files, task_id)
        last_release, last_version = self._last_numbers(task_id)
        history = self._read_on(TaskHistory(task_id))
        if len(history.releases) < last_release or len(history.versions) < last_version:
            raise CorruptData(f"Task {task_id!r} has a gap: a version or release in the middle is missing")
        check_marks(history, marks)
        return history

    def _read_on(self, known: TaskHistory) -> TaskHistory:
        # Releases first: whatever a release names was there before it.
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
        """The highest release and version by listing, to notice a missing file in the middle."""
        kinds = (self._files.names(("tasks", task_id, kind)) for kind in ("releases", "versions"))
        releases, versions = (_highest(names) for names in kinds)
        return releases, versions

    def _remember(self, history: TaskHistory) -> TaskHistory:
        """Histories only grow; a slower reader must not put back a shorter one."""
        if not history.versions and not history.releases:
            return history  # not cached: unknown ids must not fill the memory
        with self._lock:
            known = self._histories.get(history.task_id, history)
            merged = TaskHistory(
                history.task_id,
                max(known.versions, history.versions, key=len),
                max(known.releases, history.releases, key=len),
            )
            self._histories[history.task_id] = merged
            return merged


def version_name(task_id: str, number: int) -> Name:
    """Where the manifest of a version lies."""
    return ("tasks", task_id, "versions", f"{number}.json")


def release_name(task_id: str, number: int) -> Name:
    """Where the record of a release lies."""
    return ("tasks", task_id, "releases", f"{number}.json")


def _highest(names: Sequence[str]) -> int:
    return max((int(match[1]) for name in names if (match := _NUMBERED.fullmatch(name))), default=0)
