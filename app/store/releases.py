"""Releases: the history of a task's aliases, each bound to the one before it by its sha256.

    releases/1.json  {aliases: {live: 1}, previous: null, manifests: {"1": sha256 of versions/1.json}, ...}
    releases/2.json  {aliases: {live: {"1": 90, "2": 10}}, previous: sha256 of releases/1.json, ...}

Number n is claimed by put-if-absent, so moving an alias is a compare-and-set. A change anywhere
in the past breaks the chain, and the manifests that a release names are verified against its digests. The
chain is the audit log: who changed what, when and why, from the first release on.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.errors import CorruptData, InvalidRequest
from app.prompt import TaskVersion
from app.store.manifests import decode_record, now, seal
from app.store.references import MAX_ALIAS
from app.store.traffic_split import (
    AliasTarget,
    EnsembleTarget,
    SpreadTarget,
    by_weight,
    choose,
    choose_paraphrase,
    is_plain,
    target_as_json,
    target_from_json,
    versions_of,
)

FORMAT = "promptplex.release/2"
FORMAT_WITH_PROGRAMS = "promptplex.release/3"  # an alias has an ensemble, or spreads paraphrases
MOVE = "move"
ROLLBACK = "rollback"
RETIRE = "retire"
RESTORE = "restore"
MAX_RELEASE_BYTES = 1 << 20
MAX_NOTE = 1000  # characters of `who` and `why`
_COMMON = ("task_id", "number", "action", "alias", "retired", "who", "why", "at")
_FIELDS = frozenset({"format", "aliases", "previous", "manifests", *_COMMON})


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """The state of a task after one change."""

    task_id: str
    number: int  # 1, 2, 3, ...
    digest: str  # sha256 of the record
    previous_digest: str | None
    action: str  # "move", "rollback", "retire" or "restore"
    alias: str | None  # the one that moved; None: none did
    aliases: Mapping[str, AliasTarget]
    retired: bool  # nothing of the task is served
    manifest_digests: Mapping[int, str]  # of each version that `aliases` names
    who: str
    why: str
    at: str  # ISO 8601, UTC


@dataclass(frozen=True, slots=True)
class TaskHistory:
    """All of a task, verified: versions 1..m and releases 1..n."""

    task_id: str
    versions: tuple[TaskVersion, ...] = ()
    releases: tuple[Release, ...] = ()

    @property
    def aliases(self) -> Mapping[str, AliasTarget]:
        """Return the target of each alias now."""
        return self.releases[-1].aliases if self.releases else {}

    @property
    def retired(self) -> bool:
        """Return whether the task is out of service now."""
        return bool(self.releases) and self.releases[-1].retired

    def version(self, number: int) -> TaskVersion | None:
        """Return version `number`, or None."""
        return self.versions[number - 1] if 0 < number <= len(self.versions) else None


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a reference means at one moment for one user."""

    version: TaskVersion  # of an ensemble, the first of its members
    members: tuple[tuple[TaskVersion, int], ...] = ()  # of an ensemble, the one with the most weight first
    paraphrase: int | None = None  # the user's, where an alias spreads the version's over its users

    @property
    def versions(self) -> tuple[TaskVersion, ...]:
        """Return all versions that answer."""
        return tuple(version for version, _ in self.members) or (self.version,)


@dataclass(frozen=True, slots=True)
class Present:
    """A task's aliases and their versions now, verified: all that requests and listings need of it."""

    task_id: str
    num_releases: int
    retired: bool
    aliases: Mapping[str, AliasTarget]
    versions: Mapping[int, TaskVersion]  # those that the aliases name

    @classmethod
    def of(cls, history: TaskHistory) -> "Present":
        """Return the end of a history."""
        last = history.releases[-1] if history.releases else None
        named = (
            {} if last is None else {number: history.versions[number - 1] for number in last.manifest_digests}
        )
        return cls(history.task_id, len(history.releases), history.retired, history.aliases, named)

    def meaning(self, target: AliasTarget, user: str) -> Meaning:
        """Return what the target of one of the aliases means for `user`."""
        version = self.versions[choose(target, self.task_id, user)]
        if isinstance(target, EnsembleTarget):
            members = tuple((self.versions[each], target.weights[each]) for each in by_weight(target))
            return Meaning(version, members)
        if isinstance(target, SpreadTarget):
            count = len(paraphrases_of(version))
            return Meaning(version, (), choose_paraphrase(count, self.task_id, version.version, user))
        return Meaning(version)


def paraphrases_of(version: TaskVersion) -> Sequence[str]:
    """Return the templates that a version has beside its own."""
    found: Sequence[str] = version.program.get("paraphrases", ())
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What the next release of a task does, by whom and why."""

    action: str
    alias: str | None = None
    target: AliasTarget | None = None  # of `alias`
    who: str = ""
    why: str = ""


def next_release(history: TaskHistory, change: Change) -> Release:
    """Return the release after the last one of `history`, but for its digest."""
    aliases = dict(history.aliases)
    if change.alias is not None and change.target is not None:
        aliases[change.alias] = change.target
    named = sorted({version for target in aliases.values() for version in versions_of(target)})
    return Release(
        task_id=history.task_id,
        number=len(history.releases) + 1,
        digest="",
        previous_digest=history.releases[-1].digest if history.releases else None,
        action=change.action,
        alias=change.alias,
        aliases=aliases,
        retired=change.action == RETIRE or (history.retired and change.action != RESTORE),
        manifest_digests={number: history.versions[number - 1].digest for number in named},
        who=change.who[:MAX_NOTE],
        why=change.why[:MAX_NOTE],
        at=now(),
    )


def encode_release(release: Release) -> bytes:
    """Return the record of a release. Raise InvalidRequest where its aliases are too many for one."""
    data = seal(
        {name: getattr(release, name) for name in _COMMON}
        | {
            "format": FORMAT if is_plain(release.aliases.values()) else FORMAT_WITH_PROGRAMS,
            "aliases": {alias: target_as_json(target) for alias, target in release.aliases.items()},
            "previous": release.previous_digest,
            "manifests": {str(version): digest for version, digest in release.manifest_digests.items()},
        }
    )
    if len(data) > MAX_RELEASE_BYTES:
        raise InvalidRequest(
            f"The task's {len(release.aliases)} aliases exceed {MAX_RELEASE_BYTES} bytes as JSON; use fewer.",
            param="alias",
        )
    return data


def decode_release(task_id: str, number: int, data: bytes, previous: Release | None) -> Release:
    """Read a record back and verify its link to the release before it. Raise CorruptData."""
    what = f"release {number} of task {task_id!r}"
    fields = decode_record(data, what, {FORMAT: _FIELDS, FORMAT_WITH_PROGRAMS: _FIELDS})
    if (fields["task_id"], fields["number"]) != (task_id, number):
        raise CorruptData(f"The record of {what} belongs elsewhere")
    if fields["previous"] != (None if previous is None else previous.digest):
        raise CorruptData(f"The chain of releases is broken before {what}: the past was changed")
    try:
        aliases = {alias: target_from_json(value) for alias, value in fields["aliases"].items()}
        manifests = {int(version): digest for version, digest in fields["manifests"].items()}
    except (AttributeError, ValueError):
        raise CorruptData(f"The record of {what} has a field of the wrong type") from None
    if not _is_consistent(fields, aliases, manifests):
        raise CorruptData(f"The record of {what} contradicts itself")
    return Release(
        **{name: fields[name] for name in _COMMON} | {"task_id": task_id},  # one string for all records
        digest=hashlib.sha256(data).hexdigest(),
        previous_digest=fields["previous"],
        aliases=aliases,
        manifest_digests=manifests,
    )


def verify_manifests(releases: Sequence[Release], versions: Sequence[TaskVersion]) -> None:
    """Raise CorruptData unless each manifest that a release names is there, with the digest it names."""
    for release in releases:
        for number, digest in release.manifest_digests.items():
            if number > len(versions) or versions[number - 1].digest != digest:
                raise CorruptData(
                    f"Version {number} of task {release.task_id!r} is not what release {release.number} "
                    "named: it was changed or removed"
                )
        for target in release.aliases.values():
            if isinstance(target, SpreadTarget) and not paraphrases_of(versions[target.version - 1]):
                raise CorruptData(
                    f"Release {release.number} of task {release.task_id!r} spreads paraphrases of version "
                    f"{target.version}, which has none"
                )


def past_targets(history: TaskHistory, alias: str) -> list[AliasTarget]:
    """Return the targets of `alias`, oldest first; a rollback takes the last one away."""
    stack: list[AliasTarget] = []
    for release in history.releases:
        target = release.aliases.get(alias)
        if release.action == ROLLBACK and release.alias == alias and stack:
            stack.pop()
        if target is not None and (not stack or stack[-1] != target):
            stack.append(target)
    return stack


def _is_consistent(
    fields: Mapping[str, Any], aliases: Mapping[str, AliasTarget], manifests: Mapping[int, str]
) -> bool:
    named = {version for target in aliases.values() for version in versions_of(target)}
    alias = fields["alias"]
    moves = fields["action"] in (MOVE, ROLLBACK)
    return (
        (fields["format"] == FORMAT) == is_plain(aliases.values())
        and (moves or fields["action"] in (RETIRE, RESTORE))
        and (alias in aliases if moves else alias is None)
        and isinstance(fields["retired"], bool)
        and all(len(alias) <= MAX_ALIAS for alias in aliases)
        and named == manifests.keys()
        and all(isinstance(fields[name], str) for name in ("who", "why", "at"))
    )
