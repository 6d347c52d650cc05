"""Listings of tasks and their histories, and which of them the loaded base can serve."""

import time
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

from app.errors import PromptplexError
from app.prompt import TaskVersion
from app.serving.generation import GenerationService
from app.store.files import Stamp
from app.store.prompt_store import CHANGES, PromptStore
from app.store.references import DEFAULT_ALIAS
from app.store.releases import TaskHistory

LISTING_SECONDS = 1.0
UNCHANGED_SECONDS = 60.0
Shown = Callable[[str], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionState:
    """A version as this server sees it."""

    version: TaskVersion
    why_not: str | None  # None: it can be served
    resident: bool  # whether its prompt is on the device


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSummary:
    """One line of the list of tasks."""

    task_id: str
    live: VersionState | None  # None: no live version, or its records are damaged
    why_not: str | None
    requests_served: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskDetail:
    """One task in full."""

    history: TaskHistory
    versions: tuple[VersionState, ...]
    requests_served: int


class Catalog:
    """Reads the store for listings; every method may wait for the disk. One for a server's life. Thread-safe.

    Tasks for which `is_shown` is false are in no list and in no count. The ids, and each row of a page, are
    as of now, whichever process changed them. What can be served is as of now for changes by this process,
    and at most LISTING_SECONDS old for those of others (UNCHANGED_SECONDS for those of a replica that doesn't
    touch the store's folder of changes, or died before it could).
    """

    def __init__(self, store: PromptStore, generation: GenerationService) -> None:
        self._store = store
        self._generation = generation
        self._cards: dict[str, bytes] = {}  # by version digest
        self._listing = _Listing((), -1, None, 0.0, ())

    def count(self, is_shown: Shown) -> int:
        """Return how many tasks there are."""
        return _count(self._store.histories.task_ids(), is_shown)

    def page(self, is_shown: Shown, after: str | None, limit: int) -> tuple[list[TaskSummary], str | None]:
        """Return tasks in order of their ids, and the id after which the next page begins, if any."""
        ids = self._store.histories.task_ids()
        begin = 0 if after is None else bisect_right(ids, after)
        chosen = list(islice(filter(is_shown, islice(ids, begin, None)), limit + 1))
        following = chosen[limit - 1] if len(chosen) > limit else None
        resident = self._generation.engine.stats().resident_digests
        return [self._summary(task_id, resident) for task_id in chosen[:limit]], following

    def servable(self, is_shown: Shown, encode: Callable[[TaskVersion], bytes]) -> list[bytes]:
        """Return the live version of every task that can be served, by task id, as `encode` writes it.

        `encode` is the same function every time: what it made of a version is remembered.
        """
        ids, changes = self._store.histories.task_ids(), self._store.histories.num_changes
        listing, begin, stamp = self._listing, time.monotonic(), self._store.files.stamp(CHANGES)
        if not listing.is_of(ids, changes, stamp):
            rows = tuple(self._servable_rows(ids, encode))
            self._listing = listing = _Listing(
                ids, changes, stamp if stamp and stamp.is_settled else None, begin, rows
            )
        return [card for task_id, card in listing.rows if is_shown(task_id)]

    def detail(self, task_id: str) -> TaskDetail:
        """Return a task in full. Raise NotFound, InvalidRequest, CorruptData."""
        history = self._store.history(task_id)
        resident = self._generation.engine.stats().resident_digests
        return TaskDetail(
            history=history,
            versions=tuple(self._state(version, resident) for version in history.versions),
            requests_served=self._generation.requests_served.get(task_id, 0),
        )

    def _servable_rows(
        self, ids: Sequence[str], encode: Callable[[TaskVersion], bytes]
    ) -> Iterator[tuple[str, bytes]]:
        used: dict[str, bytes] = {}
        for task_id in ids:
            try:
                versions = self._store.alias_versions(task_id, DEFAULT_ALIAS)
            except PromptplexError:  # no live version, retired, damaged
                continue
            if all(self._generation.compatibility(version) is None for version in versions):
                digest = versions[0].digest
                used[digest] = self._cards.get(digest) or encode(versions[0])
                yield task_id, used[digest]
        self._cards = used

    def _summary(self, task_id: str, resident: Collection[str]) -> TaskSummary:
        live, why_not = None, None
        try:
            versions = self._store.alias_versions(task_id, DEFAULT_ALIAS)
            states = [self._state(version, resident) for version in versions]
            live = states[0]
            why_not = next((state.why_not for state in states if state.why_not is not None), None)
        except PromptplexError as error:  # one damaged task must not hide the others
            why_not = error.message
        served = self._generation.requests_served.get(task_id, 0)
        return TaskSummary(task_id=task_id, live=live, why_not=why_not, requests_served=served)

    def _state(self, version: TaskVersion, resident: Collection[str]) -> VersionState:
        return VersionState(
            version=version,
            why_not=self._generation.compatibility(version),
            resident=version.prompt_digest is not None and version.prompt_digest in resident,
        )


@lru_cache(maxsize=64)
def _count(ids: tuple[str, ...], is_shown: Shown) -> int:
    return sum(map(is_shown, ids))


@dataclass(frozen=True, slots=True)
class _Listing:
    """Every task that could be served at some moment."""

    ids: tuple[str, ...]
    num_changes: int  # of the store
    stamp: Stamp | None  # of the folder of changes; None: it may change without another stamp
    begin: float  # monotonic seconds
    rows: tuple[tuple[str, bytes], ...]

    def is_of(self, ids: tuple[str, ...], num_changes: int, stamp: Stamp | None) -> bool:
        same = self.ids == ids and self.num_changes == num_changes
        unchanged = stamp is not None and stamp == self.stamp
        return same and time.monotonic() - self.begin < (UNCHANGED_SECONDS if unchanged else LISTING_SECONDS)
