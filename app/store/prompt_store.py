"""The append-only store on a local disk. It only ever adds files, so an answer once true stays true.

    blobs/<sha256>.safetensors        canonical prompts
    tasks/<task>/versions/<n>.json    manifests; the file claims the number
    tasks/<task>/releases/<n>.json    what the aliases mean after move n; chained by sha256

The blob goes first, then the manifest, then the release, each durable before the next. Histories
are cached; one `lstat` of release n + 1 tells whether another process has moved on.
"""

import hashlib
import re
import threading
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

from app.errors import Conflict, CorruptData, InvalidRequest, NotFound
from app.prompt import Prompt, TaskVersion, VersionDraft
from app.store.files import DurableFiles, Name
from app.store.manifests import decode_version, encode_version, settings_of, settings_of_version
from app.store.references import DEFAULT_ALIAS, check_alias, check_task_id, is_task_id, parse_reference
from app.store.releases import (
    MOVE,
    ROLLBACK,
    Release,
    TaskHistory,
    decode_release,
    encode_release,
    meanings,
    verify_manifests,
)
from app.store.strict_json import canonical_json

__all__ = ["PromptStore", "Release", "TaskHistory", "open_store"]

_DIGEST = re.compile(r"[0-9a-f]{64}")
_NUMBERED = re.compile(r"([1-9][0-9]{0,8})\.json")


def open_store(root: Path) -> "PromptStore":
    """The store below a directory, which need not exist yet."""
    return PromptStore(DurableFiles(root))


class PromptStore:
    """Tasks, versions, releases and blobs below one directory.

    Thread-safe, and any number of processes may share the directory. Reading works on a read-only
    directory. Every method may raise CorruptData where what is stored doesn't hash to its name,
    and Unavailable; every writing method StoreFull, after which nothing was acknowledged.
    """

    def __init__(self, files: DurableFiles) -> None:
        self._files = files
        self._histories: dict[str, TaskHistory] = {}
        self._lock = threading.Lock()  # guards the dict only; never held across I/O

    def list_tasks(self) -> list[str]:
        """Ids of all tasks, sorted. Damage is found by `history`, per task, and hides nothing here."""
        names = sorted(name for name in self._files.names(("tasks",)) if is_task_id(name))
        firsts = (_version_name, _release_name)
        return [name for name in names if any(self._files.exists(first(name, 1)) for first in firsts)]

    def history(self, task_id: str) -> TaskHistory:
        """All versions and releases as of now, verified. Raises NotFound, InvalidRequest."""
        history = self._refresh(check_task_id(task_id))
        if not history.versions:
            raise NotFound(f"There is no task {task_id!r}")
        return history

    def resolve(self, reference: str) -> TaskVersion:
        """The version that `task`, `task@alias`, `task@3` or `task@sha256:...` means now.

        Raises NotFound; InvalidRequest where the reference is malformed.
        """
        wanted = parse_reference(reference)
        if wanted.alias is not None:
            return self._by_alias(wanted.task_id, wanted.alias)
        for history in self._cached_then_fresh(wanted.task_id):
            for version in history.versions:
                if wanted.version == version.version or wanted.digest == version.digest:
                    return version
        what = f"version {wanted.version}" if wanted.version else f"version sha256:{wanted.digest}"
        raise NotFound(f"Task {wanted.task_id!r} has no {what}")

    def publish(self, task_id: str, draft: VersionDraft) -> tuple[TaskVersion, bool]:
        """Make the draft a version, durably; no alias moves.

        Returns (version, True), or (existing version, False) where one has the same prompt and
        settings; provenance does not count. Raises InvalidRequest where settings aren't JSON.
        """
        settings = canonical_json(settings_of(draft))
        encode_version(check_task_id(task_id), 1, draft)  # refuse what can't be written before writing
        if draft.prompt is not None:
            self._put_blob(draft.prompt)
        while True:
            history = self._refresh(task_id)
            if existing := _same_settings(history, settings):
                self._files.sync(_version_name(task_id, existing.version))
                return existing, False
            number = len(history.versions) + 1
            data = encode_version(task_id, number, draft)
            if self._files.put_if_absent(_version_name(task_id, number), data):
                return decode_version(task_id, number, data), True

    def move_alias(
        self,
        task_id: str,
        alias: str,
        version: int,
        *,
        expected_release: int | None = None,
        who: str = "",
        why: str = "",
    ) -> Release:
        """Let `alias` mean `version`; where it does already, the release since which it does.

        With `expected_release` a compare-and-set: Conflict where the task's last release (0: none)
        is another one. Raises NotFound where there is no such task or version.
        """
        check_alias(alias)
        while True:
            history = self.history(task_id)
            if expected_release is not None and expected_release != len(history.releases):
                raise _moved_first(task_id, len(history.releases))
            if history.version(version) is None:
                raise NotFound(f"Task {task_id!r} has no version {version}")
            if history.aliases.get(alias) == version:
                self._files.sync(_release_name(task_id, len(history.releases)))
                return _since(history, alias, version)
            release = self._put_release(history, alias, version, action=MOVE, who=who, why=why)
            if release is not None:
                return release

    def rollback(self, task_id: str, alias: str = DEFAULT_ALIAS, *, who: str = "", why: str = "") -> Release:
        """Let the alias mean what it meant before its current meaning; again: one further back.

        Raises NotFound where there is no such alias, Conflict where it has no earlier meaning or
        somebody else moved an alias of the task at the same time.
        """
        check_alias(alias)
        history = self.history(task_id)
        stack = meanings(history, alias)
        if not stack:
            raise _no_alias(history, alias)
        if len(stack) == 1:
            raise Conflict(f"Alias {alias!r} of task {task_id!r} has no earlier version to go back to")
        release = self._put_release(history, alias, stack[-2], action=ROLLBACK, who=who, why=why)
        if release is None:
            raise _moved_first(task_id, len(history.releases) + 1)
        return release

    def read_blob(self, digest: str) -> bytes:
        """The canonical bytes whose sha256 is `digest`, verified. Raises CorruptData."""
        data = self._files.read(_blob_name(digest))
        if data is None:
            raise CorruptData(f"Prompt {digest} is not in the store")
        if hashlib.sha256(data).hexdigest() != digest:
            raise CorruptData(f"Prompt {digest} is damaged: its bytes do not hash to its name")
        return data

    def _by_alias(self, task_id: str, alias: str) -> TaskVersion:
        """Exact across processes: the cached history counts only while release n + 1 is absent."""
        history = self._cached(task_id)
        if history is None or self._files.exists(_release_name(task_id, len(history.releases) + 1)):
            history = self.history(task_id)
        version = history.version(history.aliases.get(alias, 0))
        if version is None:
            raise _no_alias(history, alias)
        return version

    def _put_blob(self, prompt: Prompt) -> None:
        assert hashlib.sha256(prompt.data).hexdigest() == prompt.digest
        name = _blob_name(prompt.digest)
        if self._files.exists(name) or not self._files.put_if_absent(name, prompt.data):
            self.read_blob(prompt.digest)  # what is there already must be good to build upon
            self._files.sync(name)

    def _put_release(
        self, history: TaskHistory, alias: str, version: int, *, action: str, who: str, why: str
    ) -> Release | None:
        """The next release, or None where somebody else claimed its number."""
        number = len(history.releases) + 1
        data = encode_release(history, alias, version, action=action, who=who, why=why)
        if not self._files.put_if_absent(_release_name(history.task_id, number), data):
            return None
        previous = history.releases[-1] if history.releases else None
        return decode_release(history.task_id, number, data, previous)

    def _cached(self, task_id: str) -> TaskHistory | None:
        with self._lock:
            return self._histories.get(task_id)

    def _cached_then_fresh(self, task_id: str) -> Iterator[TaskHistory]:
        """Versions are immutable: what the cache has is right; what it lacks may be new."""
        cached = self._cached(task_id)
        if cached is not None:
            yield cached
        yield self.history(task_id)

    def _refresh(self, task_id: str) -> TaskHistory:
        """Read what was added since the cached history; an unknown task has an empty one."""
        cached = self._cached(task_id)
        known = cached or TaskHistory(task_id)
        last = self._last_numbers(task_id) if cached is None else (0, 0)
        # Releases first: whatever a release names was there before it.
        releases = self._read_releases(known)
        versions = self._read_versions(known)
        if len(releases) < last[0] or len(versions) < last[1]:
            raise CorruptData(f"Task {task_id!r} has a gap: a version or release in the middle is missing")
        verify_manifests(releases[len(known.releases) :], versions)
        return self._remember(TaskHistory(task_id, versions, releases))

    def _read_releases(self, known: TaskHistory) -> tuple[Release, ...]:
        found = list(known.releases)
        while (data := self._files.read(_release_name(known.task_id, len(found) + 1))) is not None:
            previous = found[-1] if found else None
            found.append(decode_release(known.task_id, len(found) + 1, data, previous))
        return tuple(found)

    def _read_versions(self, known: TaskHistory) -> tuple[TaskVersion, ...]:
        found = list(known.versions)
        while (data := self._files.read(_version_name(known.task_id, len(found) + 1))) is not None:
            found.append(decode_version(known.task_id, len(found) + 1, data))
        return tuple(found)

    def _last_numbers(self, task_id: str) -> tuple[int, int]:
        """The highest release and version by listing, to notice a missing file in the middle."""
        kinds = (self._files.names(("tasks", task_id, kind)) for kind in ("releases", "versions"))
        releases, versions = (
            max((int(match[1]) for name in names if (match := _NUMBERED.fullmatch(name))), default=0)
            for names in kinds
        )
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


def _same_settings(history: TaskHistory, settings: bytes) -> TaskVersion | None:
    for version in history.versions:
        if canonical_json(settings_of_version(version)) == settings:
            return version
    return None


def _blob_name(digest: str) -> Name:
    if not _DIGEST.fullmatch(digest):
        raise InvalidRequest("A prompt digest is 64 hex digits", param="digest")
    return ("blobs", f"{digest}.safetensors")


def _version_name(task_id: str, number: int) -> Name:
    return ("tasks", task_id, "versions", f"{number}.json")


def _release_name(task_id: str, number: int) -> Name:
    return ("tasks", task_id, "releases", f"{number}.json")


def _since(history: TaskHistory, alias: str, version: int) -> Release:
    """The release since which the alias has meant its present version."""
    same = takewhile(lambda release: release.aliases.get(alias) == version, reversed(history.releases))
    return list(same)[-1]


def _no_alias(history: TaskHistory, alias: str) -> NotFound:
    known = ", ".join(sorted(history.aliases)[:20]) or "none"
    return NotFound(f"Task {history.task_id!r} has no alias {alias!r}; it has: {known}")


def _moved_first(task_id: str, current: int) -> Conflict:
    return Conflict(
        f"Somebody else moved an alias of task {task_id!r} first: its last release is {current}. "
        "Look at it and try again"
    )
