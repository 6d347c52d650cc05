"""The append-only store. It only ever adds files, so an answer once true stays true.

    blobs/<sha256>.safetensors        canonical prompts
    tasks/<task>/versions/<n>.json    manifests; the file claims the number
    tasks/<task>/releases/<n>.json    what the aliases mean after change n; chained by sha256
    changes/                          touched after each release: whoever lists tasks looks at it
    tasks/<task>/heads/               marks by which records that are gone are missed
    quarantine/                       what no longer hashed to its name

The blob goes first, then the manifest, then the release, each durable before the next, and each record
before its mark.
"""

import hashlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

from app.errors import Conflict, NotFound, PromptplexError
from app.prompt import TaskVersion, VersionDraft
from app.store.blobs import Blobs
from app.store.files import DurableFiles, WriteOnceFiles
from app.store.heads import mark
from app.store.history import HistoryReader, release_name, version_name
from app.store.manifests import encode_version, settings_of, version_of
from app.store.references import DEFAULT_ALIAS, Reference, check_alias, check_task_id, parse_reference
from app.store.releases import (
    MOVE,
    RESTORE,
    RETIRE,
    ROLLBACK,
    Change,
    Present,
    Release,
    TaskHistory,
    encode_release,
    meanings,
    next_release,
)
from app.store.traffic_split import Meaning, choose, versions_of, weighted

# An empty folder, touched after each release; a hint for listings, trusted by nothing else.
CHANGES = ("changes",)

__all__ = ["PromptStore", "Release", "TaskHistory", "open_store"]


def open_store(root: Path) -> "PromptStore":
    """The store below a directory, which need not exist yet."""
    return PromptStore(DurableFiles(root))


class PromptStore:
    """Tasks, versions, releases and blobs.

    Thread-safe, and any number of processes may share the files. Reading works where they are
    read-only. Every method may raise CorruptData where what is stored doesn't hash to its name,
    and Unavailable; every writing method StoreFull, after which nothing was acknowledged.
    """

    def __init__(self, files: WriteOnceFiles) -> None:
        self.files = files
        self.blobs = Blobs(files)
        self.histories = HistoryReader(files)

    # -- reading ----------------------------------------------------------------------------

    def list_tasks(self) -> list[str]:
        """Ids of all tasks, retired ones too, sorted."""
        return list(self.histories.task_ids())

    def read_ahead(self) -> None:
        """Read what every task's aliases mean, for the first listing; damage is told elsewhere."""
        with suppress(PromptplexError):
            for task_id in self.list_tasks():
                with suppress(PromptplexError):
                    self.histories.current(task_id)

    def history(self, task_id: str) -> TaskHistory:
        """All versions and releases as of now, verified. Raises NotFound, InvalidRequest."""
        history = self.histories.refresh(check_task_id(task_id))
        if not history.versions:
            raise NotFound(f"There is no task {task_id!r}")
        return history

    def resolve(self, reference: str, asker: str = "") -> TaskVersion:
        """The version that `task`, `task@alias`, `task@3` or `task@sha256:...` means now for `asker`.

        Raises NotFound, also where the task is retired; InvalidRequest where the reference is malformed.
        """
        wanted = parse_reference(reference)
        present = self._in_service(wanted.task_id)
        if wanted.alias is not None and (meaning := present.aliases.get(wanted.alias)) is not None:
            return present.versions[choose(meaning, wanted.task_id, asker)]
        history = self.histories.cached(wanted.task_id)
        version = None if history is None else _find(history, wanted)
        if version is None:  # versions are immutable: what is cached is right, what it lacks may be new
            version = _find(self.history(wanted.task_id), wanted)
        if version is None:
            raise _not_there(self.history(wanted.task_id), wanted)
        return version

    def meant_by(self, task_id: str, alias: str) -> list[TaskVersion]:
        """Every version that the alias means now, the one with the most weight first.

        Raises NotFound, also where the task is retired.
        """
        present = self._in_service(check_task_id(task_id))
        meaning = present.aliases.get(alias)
        if meaning is None:
            raise _no_alias(self.history(task_id), alias)
        weights = {meaning: 1} if isinstance(meaning, int) else meaning
        versions = sorted(weights, key=lambda version: (-weights[version], version))
        return [present.versions[version] for version in versions]

    def _in_service(self, task_id: str) -> Present:
        present = self.histories.current(task_id)
        if present.retired:
            raise NotFound(f"Task {task_id!r} is retired; restore it to use it again")
        return present

    def read_blob(self, digest: str) -> bytes:
        """The canonical bytes whose sha256 is `digest`, verified. Raises CorruptData."""
        return self.blobs.read(digest)

    def heal_blob(self, digest: str, data: bytes) -> bool:
        """Put good bytes back where the store lost them; whether that was needed."""
        return self.blobs.heal(digest, data)

    # -- publishing -------------------------------------------------------------------------

    def publish(self, task_id: str, draft: VersionDraft) -> tuple[TaskVersion, bool]:
        """Make the draft a version, durably; no alias moves.

        Returns (version, True), or (existing version, False) where one has the same prompt and
        settings; provenance does not count. Raises InvalidRequest where settings aren't JSON,
        Conflict where the task is retired.
        """
        wanted = version_of(check_task_id(task_id), 1, draft)
        encode_version(wanted)  # refuse what can't be written before writing
        _check_in_service(self.histories.refresh(task_id))
        if draft.prompt is not None:
            self.blobs.put(draft.prompt.digest, draft.prompt.data)
        version, created = self._claim(wanted)
        if draft.prompt is not None and not self.blobs.exists(draft.prompt.digest):
            # It had lain unreferenced for so long that it was swept away just before the manifest came.
            self.blobs.put(draft.prompt.digest, draft.prompt.data)
        return version, created

    def _claim(self, wanted: TaskVersion) -> tuple[TaskVersion, bool]:
        """The version, under the next number that nobody else claims; or one with the same settings."""
        task_id, settings = wanted.task_id, settings_of(wanted)
        while True:
            history = self.histories.refresh(task_id)
            _check_in_service(history)
            if existing := self.histories.with_settings(history, settings):
                self.files.sync(version_name(task_id, existing.version))
                mark(self.files, existing)
                return existing, False
            version = replace(wanted, version=len(history.versions) + 1)
            data = encode_version(version)
            if self.files.put_if_absent(version_name(task_id, version.version), data):
                version = replace(version, digest=hashlib.sha256(data).hexdigest())
                mark(self.files, version)
                return version, True

    # -- releasing --------------------------------------------------------------------------

    def move_alias(
        self,
        task_id: str,
        alias: str,
        target: int | Mapping[int, int],
        *,
        expected_release: int | None = None,
        who: str = "",
        why: str = "",
    ) -> Release:
        """Let `alias` mean a version, or versions by weight; where it does, the release since which.

        With `expected_release` a compare-and-set: Conflict where the task's last release (0: none)
        is another one, or the task is retired. Raises NotFound where there is no such task or version.
        """
        check_alias(alias)
        meaning = target if isinstance(target, int) else weighted(target)

        def decide(history: TaskHistory) -> Change | Release:
            _check_expected(history, expected_release)
            _check_in_service(history)
            _check_versions(history, meaning)
            if history.aliases.get(alias) == meaning:
                return _since(history, alias, meaning)
            return Change(action=MOVE, alias=alias, meaning=meaning, who=who, why=why)

        return self._release(task_id, decide)

    def rollback(self, task_id: str, alias: str = DEFAULT_ALIAS, *, who: str = "", why: str = "") -> Release:
        """Let the alias mean what it meant before its current meaning; again: one further back.

        Raises NotFound where there is no such alias, Conflict where it has no earlier meaning, the task
        is retired, or somebody else moved an alias of the task at the same time.
        """
        check_alias(alias)
        history = self.history(task_id)
        _check_in_service(history)
        stack = meanings(history, alias)
        if not stack:
            raise _no_alias(history, alias)
        if len(stack) == 1:
            raise Conflict(f"Alias {alias!r} of task {task_id!r} has no earlier version to go back to")
        change = Change(action=ROLLBACK, alias=alias, meaning=stack[-2], who=who, why=why)
        release = self._put_release(history, change)
        if release is None:  # not tried again: going back from what somebody just released is another wish
            raise _moved_first(task_id, len(history.releases) + 1)
        return release

    def retire(self, task_id: str, *, who: str = "", why: str = "") -> Release:
        """Take the task out of service; what runs finishes. Where it is retired, the release since which."""

        def decide(history: TaskHistory) -> Change | Release:
            if history.retired:
                return _last_change(history, RETIRE)
            return Change(action=RETIRE, who=who, why=why)

        return self._release(task_id, decide)

    def restore(self, task_id: str, *, who: str = "", why: str = "") -> Release:
        """Bring a retired task back as it was. Conflict where it isn't retired and never was."""

        def decide(history: TaskHistory) -> Change | Release:
            if not history.retired:
                return _last_change(history, RESTORE)
            return Change(action=RESTORE, who=who, why=why)

        return self._release(task_id, decide)

    def _release(self, task_id: str, decide: Callable[[TaskHistory], Change | Release]) -> Release:
        """Decide on the newest history until nobody was faster; an existing release is made sure of."""
        while True:
            history = self.history(task_id)
            decision = decide(history)
            if isinstance(decision, Release):
                self.files.sync(release_name(task_id, decision.number))
                mark(self.files, decision)
                return decision
            if (release := self._put_release(history, decision)) is not None:
                return release

    def _put_release(self, history: TaskHistory, change: Change) -> Release | None:
        """The next release, or None where somebody else claimed its number."""
        release = next_release(history, change)
        data = encode_release(release)
        if not self.files.put_if_absent(release_name(release.task_id, release.number), data):
            return None
        release = replace(release, digest=hashlib.sha256(data).hexdigest())
        mark(self.files, release)
        self.histories.note_change()
        self.files.touch_directory(CHANGES)
        return release


def _find(history: TaskHistory, wanted: Reference) -> TaskVersion | None:
    """The version that is asked for by its number or digest."""
    if wanted.version is not None:
        return history.version(wanted.version)
    return next((version for version in history.versions if version.digest == wanted.digest), None)


def _not_there(history: TaskHistory, wanted: Reference) -> NotFound:
    if wanted.alias is not None:
        return _no_alias(history, wanted.alias)
    what = f"version {wanted.version}" if wanted.version else f"version sha256:{wanted.digest}"
    return NotFound(f"Task {wanted.task_id!r} has no {what}")


def _check_in_service(history: TaskHistory) -> None:
    if history.retired:
        raise Conflict(f"Task {history.task_id!r} is retired; restore it first")


def _check_expected(history: TaskHistory, expected_release: int | None) -> None:
    if expected_release is not None and expected_release != len(history.releases):
        raise _moved_first(history.task_id, len(history.releases))


def _check_versions(history: TaskHistory, meaning: Meaning) -> None:
    for version in versions_of(meaning):
        if history.version(version) is None:
            raise NotFound(f"Task {history.task_id!r} has no version {version}")


def _since(history: TaskHistory, alias: str, meaning: Meaning) -> Release:
    """The release since which the alias has had its present meaning."""
    same = takewhile(lambda release: release.aliases.get(alias) == meaning, reversed(history.releases))
    return list(same)[-1]


def _last_change(history: TaskHistory, action: str) -> Release:
    found = next((release for release in reversed(history.releases) if release.action == action), None)
    if found is None:
        raise Conflict(f"Task {history.task_id!r} is not retired")
    return found


def _no_alias(history: TaskHistory, alias: str) -> NotFound:
    known = ", ".join(sorted(history.aliases)[:20]) or "none"
    return NotFound(f"Task {history.task_id!r} has no alias {alias!r}; it has: {known}")


def _moved_first(task_id: str, current: int) -> Conflict:
    return Conflict(
        f"Somebody else moved an alias of task {task_id!r} first: its last release is {current}. "
        "Look at it and try again"
    )
