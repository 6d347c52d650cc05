"""Held sequences: keys and values that stay after a sequence's end, for those that continue it.

A cache, nothing more: whether a sequence is found here changes what is computed, never what comes of it. A
held sequence pins its prefixes and keeps its slot table; one that continues it forks that table up to where
their tokens differ. There is a bounded number of them, and they are the first to go when blocks are needed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from app.engine.blocks import SlotTable
from app.engine.prefixes import Key, Prefix, PrefixCache
from app.engine.sequence import Sequence
from app.request import Request, Segment

MAX_HELD = 256


@dataclass(eq=False, slots=True)
class Held:
    """What a sequence leaves: its prefixes, and its own tokens that have keys and values."""

    request: Request
    prefix_keys: tuple[Key, ...]
    prefixes: tuple[Prefix, ...]  # pinned
    table: SlotTable
    tokens: list[int]  # at least one

    def aligned(self, request: Request) -> Request:
        """Return a request that continues this one, with segments cut as this one's are.

        Segments that aren't kept are only text, so where they end is free. Return the request as it is where
        its text doesn't begin with theirs, or would have no place left for its scores.
        """
        own, kept = self.request, self.request.num_kept_segments
        others = (*own.segments[kept:], *request.segments[request.num_kept_segments :])
        are_text = all(segment.prompt_digest is None for segment in others)
        if request.segments == own.segments or not are_text:
            return request
        if request.segments[: request.num_kept_segments] != own.segments[:kept]:
            return request
        begin = _ids(own.segments[kept:])
        ids = _ids(request.segments[kept:]) + request.token_ids
        if ids[: len(begin)] != begin or len(ids) - len(begin) <= request.num_scored:
            return request
        return replace(request, segments=own.segments, token_ids=ids[len(begin) :])

    def num_shared(self, sequence: Sequence) -> int:
        """Return how many own tokens of a sequence needn't be computed: at most all but the last."""
        if sequence.prefix_keys != self.prefix_keys:
            return 0
        limit = min(len(self.tokens), sequence.num_reusable)
        pairs = zip(self.tokens[:limit], sequence.tokens, strict=False)
        return next((number for number, (own, other) in enumerate(pairs) if own != other), limit)


def _ids(segments: tuple[Segment, ...]) -> tuple[int, ...]:
    return tuple(id_ for segment in segments for id_ in segment.token_ids)


class HeldSequences:
    """All held sequences, by the id of their request."""

    def __init__(self, prefixes: PrefixCache) -> None:
        self.max_held = MAX_HELD
        self._prefixes = prefixes
        self._held: dict[str, Held] = {}  # least recently used first
        # Slots of these are copied before the next step: until then they can't be given to others.
        self.lenders: set[str] = set()

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[Held]:
        return iter(self._held.values())

    def add(self, sequence: Sequence) -> None:
        """Take over what a sequence has on the device; what it continued goes, since this begins alike."""
        request, table = sequence.request, sequence.table
        assert table is not None
        for id_ in (request.id, request.continues):
            self.drop(id_)
        if len(self._held) >= self.max_held:
            self.evict()
        tokens = sequence.tokens[: sequence.num_computed]
        self._held[request.id] = Held(request, sequence.prefix_keys, sequence.prefixes, table, tokens)

    def get(self, request_id: str | None) -> Held | None:
        """Return what is held of a request, if anything."""
        return None if request_id is None else self._held.get(request_id)

    def lend(self, request_id: str | None) -> None:
        """Note that a sequence was placed on a fork of its table: it is the most recently used one."""
        if request_id is not None and request_id in self._held:
            self._held[request_id] = self._held.pop(request_id)
            self.lenders.add(request_id)

    def drop(self, request_id: str | None) -> None:
        """Give back what is held of a request, if anything."""
        held = None if request_id is None else self._held.pop(request_id, None)
        if held is not None:
            held.table.release()
            self._prefixes.unpin(held.prefixes)

    def drop_on(self, key: Key) -> None:
        """Give back all that stands on a prefix with wrong keys and values."""
        for held in [held for held in self if key in held.prefix_keys]:
            self.drop(held.request.id)

    def evict(self) -> bool:
        """Give back the least recently used one; return whether there was one that may go now."""
        oldest = next((request_id for request_id in self._held if request_id not in self.lenders), None)
        self.drop(oldest)
        return oldest is not None
