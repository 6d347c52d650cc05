"""Releases: the history of a task's aliases, each bound to the one before it by its sha256.

    releases/1.json  {aliases: {live: 1}, previous: null, manifests: {"1": sha256 of versions/1.json}, ...}
    releases/2.json  {aliases: {live: 2}, previous: sha256 of releases/1.json, ...}

Number n is claimed by put-if-absent, so moving an alias is a compare-and-set. A change anywhere
in the past breaks the chain, and what a release names is verified against its digests.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.errors import CorruptData
from app.prompt import TaskVersion
from app.store.manifests import decode_record, now
from app.store.references import MAX_ALIAS
from app.store.strict_json import canonical_json

FORMAT = "promptplex.release/1"
MOVE = "move"
ROLLBACK = "rollback"
MAX_NOTE = 1000  # characters of `who` and `why`
_FIELDS = frozenset(
    {"format", "task_id", "number", "action", "alias", "aliases", "previous", "manifests", "who", "why", "at"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """What every alias means after one move."""

    task_id: str
    number: int  # 1, 2, 3, ...
    digest: str  # sha256 of the record
    previous_digest: str | None
    action: str  # "move" or "rollback"
    alias: str  # the one that moved
    aliases: Mapping[str, int]
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
    def aliases(self) -> Mapping[str, int]:
        """What each alias means now."""
        return self.releases[-1].aliases if self.releases else {}

    def version(self, number: int) -> TaskVersion | None:
        """Version `number`, or None."""
        return self.versions[number - 1] if 0 < number <= len(self.versions) else None


def encode_release(
    history: TaskHistory, alias: str, version: int, *, action: str, who: str, why: str
) -> bytes:
    """The record of the release after the last one of `history`, which moves `alias`."""
    aliases = {**history.aliases, alias: version}
    return canonical_json(
        {
            "format": FORMAT,
            "task_id": history.task_id,
            "number": len(history.releases) + 1,
            "action": action,
            "alias": alias,
            "aliases": aliases,
            "previous": history.releases[-1].digest if history.releases else None,
            "manifests": {str(n): history.versions[n - 1].digest for n in sorted(set(aliases.values()))},
            "who": who[:MAX_NOTE],
            "why": why[:MAX_NOTE],
            "at": now(),
        }
    )


def decode_release(task_id: str, number: int, data: bytes, previous: Release | None) -> Release:
    """Read a record back and verify its link to the release before it. Raises CorruptData."""
    what = f"release {number} of task {task_id!r}"
    fields = decode_record(data, what, FORMAT, _FIELDS)
    if (fields["task_id"], fields["number"]) != (task_id, number):
        raise CorruptData(f"The record of {what} belongs elsewhere")
    if fields["previous"] != (None if previous is None else previous.digest):
        raise CorruptData(f"The chain of releases is broken before {what}: the past was changed")
    if not _is_consistent(fields):
        raise CorruptData(f"The record of {what} contradicts itself")
    return Release(
        task_id=task_id,
        number=number,
        digest=hashlib.sha256(data).hexdigest(),
        previous_digest=fields["previous"],
        action=fields["action"],
        alias=fields["alias"],
        aliases=fields["aliases"],
        manifest_digests={int(version): digest for version, digest in fields["manifests"].items()},
        who=fields["who"],
        why=fields["why"],
        at=fields["at"],
    )


def verify_manifests(releases: Sequence[Release], versions: Sequence[TaskVersion]) -> None:
    """Each manifest that a release names is there and hashes to what the release says."""
    for release in releases:
        for number, digest in release.manifest_digests.items():
            if number > len(versions) or versions[number - 1].digest != digest:
                raise CorruptData(
                    f"Version {number} of task {release.task_id!r} is not what release {release.number} "
                    "named: it was changed or removed"
                )


def meanings(history: TaskHistory, alias: str) -> list[int]:
    """What `alias` meant, oldest first; rollbacks take meanings away, the last one is current."""
    stack: list[int] = []
    for release in history.releases:
        version = release.aliases.get(alias)
        if release.action == ROLLBACK and release.alias == alias and stack:
            stack.pop()
        if version is not None and (not stack or stack[-1] != version):
            stack.append(version)
    return stack


def _is_consistent(fields: dict[str, Any]) -> bool:
    aliases, manifests = fields["aliases"], fields["manifests"]
    return (
        isinstance(aliases, dict)
        and isinstance(manifests, dict)
        and fields["action"] in (MOVE, ROLLBACK)
        and fields["alias"] in aliases
        and all(type(version) is int and version > 0 for version in aliases.values())
        and all(len(alias) <= MAX_ALIAS for alias in aliases)
        and {str(version) for version in aliases.values()} == manifests.keys()
        and all(isinstance(fields[name], str) for name in ("who", "why", "at"))
    )
