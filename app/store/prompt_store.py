"""The append-only store. It only ever adds files, so an answer once true stays true.

    blobs/<sha256>.safetensors        canonical prompts
    tasks/<task>/versions/<n>.json    manifests; the file claims the number
    tasks/<task>/releases/<n>.json    the aliases after change n; chained by sha256
    changes/                          touched after each release: listings look at it
    tasks/<task>/heads/               marks that show when a record is lost
    quarantine/                       files that no longer hashed to their names

The blob goes first, then the manifest, then the release, each durable before the next, and each record
before its mark.
"""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

from app.errors import Conflict, InvalidRequest, NotFound, PromptplexError
from app.prompt import TaskVersion, VersionDraft
from app.store.blobs import Blobs
from app.store.files import DurableFiles
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
    Meaning,
    Present,
    Release,
    TaskHistory,
    encode_release,
    next_release,
    paraphrases_of,
    past_targets,
)
from app.store.traffic_split import AliasTarget, SpreadTarget, by_weight, checked_target, versions_of

# An empty folder, touched after each release; a hint for listings, trusted by nothing else.
CHANGES = ("changes",)


def open_store(root: Path) -> "PromptStore":
    """Return the store below a directory, which need not exist yet."""
    return PromptStore(DurableFiles(root))


class PromptStore:
    """Tasks, versions, releases and blobs.

    Thread-safe, and any number of processes may share the files. Reading works where they are
    read-only. Every method may raise CorruptData where stored bytes don't hash to their name,
    and Unavailable; every writing method StoreFull, after which nothing was acknowledged.
    """

    def __init__(self, files: DurableFiles) -> None:
        self.files = files
        self.blobs = Blobs(files)
        self.histories = HistoryReader(files)

    # -- reading ----------------------------------------------------------------------------

    def list_tasks(self) -> list[str]:
        """Return the ids of all tasks, retired ones too, sorted."""
        return list(self.histories.task_ids())

    def read_ahead(self) -> None:
        """Read every task's aliases, for the first listing; damage is reported elsewhere."""
        with suppress(PromptplexError):
            for task_id in self.list_tasks():
                with suppress(PromptplexError):
                    self.histories.current(task_id)

    def history(self, task_id: str) -> TaskHistory:
        """Return all versions and releases as of now, verified. Raise NotFound, InvalidRequest."""
        history = self.histories.refresh(check_task_id(task_id))
        if not history.versions:
            raise NotFound(f"There is no task {task_id!r}")
        return history

    def resolve(self, reference: str, user: str = "") -> TaskVersion:
        """Return the version that the reference names now for `user`; of an ensemble, the first one.

        Raise as `meaning`.
        """
        return self.meaning(reference, user).version

    def meaning(self, reference: str, user: str = "") -> Meaning:
        """Return what `task`, `task@alias`, `task@3` or `task@sha256:...` means now for `user`.

        Raise NotFound, also where the task is retired; InvalidRequest where the reference is malformed.
        """
        wanted = parse_reference(reference)
        present = self._in_service(wanted.task_id)
        if wanted.alias is not None and (target := present.aliases.get(wanted.alias)) is not None:
            return present.meaning(target, user)
        history = self.histories.cached(wanted.task_id)
        version = None if history is None else _find(history, wanted)
        if version is None:  # versions are immutable: what is cached is right, what it lacks may be new
            version = _find(self.history(wanted.task_id), wanted)
        if version is None:
            raise _not_there(self.history(wanted.task_id), wanted)
        return Meaning(version)

    def alias_versions(self, task_id: str, alias: str) -> list[TaskVersion]:
        """Return every version that the alias points at now, the one with the most weight first.

        Raise NotFound, also where the task is retired.
        """
        present = self._in_service(check_task_id(task_id))
        target = present.aliases.get(alias)
        if target is None:
            raise _no_alias(self.history(task_id), alias)
        return [present.versions[version] for version in by_weight(target)]

    def _in_service(self, task_id: str) -> Present:
        present = self.histories.current(task_id)
        if present.retired:
            raise NotFound(f"Task {task_id!r} is retired; restore it to use it again")
        return present

    def read_blob(self, digest: str) -> bytes:
        """Return the canonical bytes of this sha256, verified. Raise CorruptData."""
        return self.blobs.read(digest)

    def heal_blob(self, digest: str, data: bytes) -> bool:
        """Put good bytes back where the store lost them. Return whether that was needed."""
        return self.blobs.heal(digest, data)

    # -- publishing -------------------------------------------------------------------------

    def publish(self, task_id: str, draft: VersionDraft) -> tuple[TaskVersion, bool]:
        """Make the draft a version, durably; no alias moves.

        Return (version, True), or (existing version, False) where one has the same prompt and
        settings; provenance does not count. Raise InvalidRequest where settings aren't JSON,
        Conflict where the task is retired.
        """
        wanted = version_of(check_task_id(task_id), 1, draft)
        encode_version(wanted)  # refuse what can't be written before writing
        _check_in_service(self.histories.refresh(task_id))
        if draft.prompt is not None:
            self.blobs.put(draft.prompt.digest, draft.prompt.data)
        version, created = self._claim(wanted)
        if draft.prompt is not None and not self.blobs.exists(draft.prompt.digest):
            # It was unreferenced for so long that it was collected just before the manifest came.
            self.blobs.put(draft.prompt.digest, draft.prompt.data)
        return version, created

    def _claim(self, wanted: TaskVersion) -> tuple[TaskVersion, bool]:
        """Claim the next number for the version, or return the one that has the same settings."""
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
        target: AliasTarget,
        *,
        expected_release: int | None = None,
        who: str = "",
        why: str = "",
    ) -> Release:
        """Point `alias` at one version or several. Return the release that did, new or old.

        With `expected_release` a compare-and-set: Conflict where the task's last release (0: none)
        is another one, or the task is retired. Raise NotFound where there is no such task or version,
        InvalidRequest where the target makes no sense.
        """
        check_alias(alias)
        target = checked_target(target)

        def decide(history: TaskHistory) -> Change | Release:
            _check_expected(history, expected_release)
            _check_in_service(history)
            _check_versions(history, target)
            if history.aliases.get(alias) == target:
                return _since(history, alias, target)
            return Change(action=MOVE, alias=alias, target=target, who=who, why=why)

        return self._release(task_id, decide)

    def rollback(self, task_id: str, alias: str = DEFAULT_ALIAS, *, who: str = "", why: str = "") -> Release:
        """Point the alias at its previous target; again: one further back.

        Raise NotFound where there is no such alias, Conflict where it has no earlier target, the task
        is retired, or another caller moved an alias of the task at the same time.
        """
        check_alias(alias)
        history = self.history(task_id)
        _check_in_service(history)
        stack = past_targets(history, alias)
        if not stack:
            raise _no_alias(history, alias)
        if len(stack) == 1:
            raise Conflict(f"Alias {alias!r} of task {task_id!r} has no earlier version to go back to")
        change = Change(action=ROLLBACK, alias=alias, target=stack[-2], who=who, why=why)
        release = self._put_release(history, change)
        if release is None:  # not tried again: a rollback of what was just released is another request
            raise _moved_first(task_id, len(history.releases) + 1)
        return release

    def retire(self, task_id: str, *, who: str = "", why: str = "") -> Release:
        """Take the task out of service; what runs finishes. Return the release that did, new or old."""

        def decide(history: TaskHistory) -> Change | Release:
            if history.retired:
                return _last_change(history, RETIRE)
            return Change(action=RETIRE, who=who, why=why)

        return self._release(task_id, decide)

    def restore(self, task_id: str, *, who: str = "", why: str = "") -> Release:
        """Bring a retired task back as it was. Raise Conflict where it was never retired."""

        def decide(history: TaskHistory) -> Change | Release:
            if not history.retired:
                return _last_change(history, RESTORE)
            return Change(action=RESTORE, who=who, why=why)

        return self._release(task_id, decide)

    def _release(self, task_id: str, decide: Callable[[TaskHistory], Change | Release]) -> Release:
        """Decide on the newest history until no other writer is faster; an existing release is synced."""
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
        """Write the next release; None where another writer claimed its number."""
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
    """Return the version with the wanted number or digest."""
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


def _check_versions(history: TaskHistory, target: AliasTarget) -> None:
    for version in versions_of(target):
        found = history.version(version)
        if found is None:
            raise NotFound(f"Task {history.task_id!r} has no version {version}")
        if isinstance(target, SpreadTarget) and not paraphrases_of(found):
            raise InvalidRequest(
                f"Version {version} has no paraphrases to spread over users; publish one that has some, or "
                "leave spread_paraphrases out.",
                param="spread_paraphrases",
            )


def _since(history: TaskHistory, alias: str, target: AliasTarget) -> Release:
    """Return the release that gave the alias its present target."""
    same = takewhile(lambda release: release.aliases.get(alias) == target, reversed(history.releases))
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
        f"Another client moved an alias of task {task_id!r} first: its last release is {current}. "
        "Look at it and try again"
    )
