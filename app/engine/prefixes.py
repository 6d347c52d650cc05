"""Resident prefixes: segments of prompts as keys and values, shared by reference.

Prefixes form a tree: each is one segment on those of its parent, so a request stands on a line of
them, from a root on. A prefix is built inside ordinary Plans (its tokens count against the token
budget), pinned while a running sequence stands on it, and kept afterwards until its blocks are
needed, least recently used first. Its key never holds a name (invariant 5).

In an encoder-decoder a prefix has slots at three sites, perhaps none at some. What its decoder computes
depends on the source, so the requests of one source share it, and it goes with them.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from app.engine.blocks import Counts, KVBlocks, SlotTable
from app.engine.plan import new_id
from app.engine.sources import Source
from app.models.attention.backend import Head
from app.models.attention.kv_cache import Slots
from app.prompt import ModelGeometry, Prompt, PromptKind
from app.request import Request, Segment
from app.sites import Site

Key = bytes


def prefix_keys(request: Request, geometry: ModelGeometry) -> tuple[Key, ...]:
    """Return the key of each segment on those before it: the same key means the same keys and values."""
    key = hashlib.sha256(f"{geometry.fingerprint} {geometry.dtype}".encode()).digest()
    keys = []
    for segment in request.segments:
        source = "" if segment.is_kept or request.source is None else repr(request.source)
        learned = f"{segment.prompt_digest} {[*segment_slots(segment).values()]} {source}".encode()
        key = hashlib.sha256(key + learned + segment.ids_digest).digest()
        keys.append(key)
    return tuple(keys)


def segment_slots(segment: Segment) -> dict[Site, int]:
    """Return how many slots a segment takes at each site."""
    return {
        Site.DECODER_SELF: segment.num_slots,
        Site.DECODER_CROSS: segment.num_cross_tokens,
        Site.ENCODER_SELF: segment.num_encoder_tokens,
    }


@dataclass(eq=False)
class Prefix:
    """One resident segment and how far it is built.

    Positions differ from slots where a prompt's format counts virtual tokens as zero positions
    (Prompt.position_offset).
    """

    key: Key
    segment: Segment
    parent: "Prefix | None"
    tables: Mapping[Site, SlotTable]  # at each site of the base
    prompt: Prompt | None  # the learned one, until it is built
    is_kept: bool  # False: gone as soon as it has no pins and isn't expected
    source: Source | None = None  # that its tokens attend to
    num_computed: int = 0  # own slots in the decoder's self-attention whose keys and values exist
    pins: int = 0  # sequences that stand on it, or on one of its descendants
    id: int = field(default_factory=new_id)  # in Plans
    end_slots: Mapping[Site, int] = field(init=False)  # the slot index after its last one
    first_slot: int = field(init=False)  # in the decoder's self-attention
    first_position: int = field(init=False)
    end_position: int = field(init=False)  # the position of what follows
    ancestors: tuple[int, ...] = field(init=False)  # their ids
    heads: tuple[Head, ...] = field(
        init=False
    )  # in the decoder's self-attention: its ancestors' slots, its own

    def __post_init__(self) -> None:
        above = self.parent
        self.end_slots = {site: _end(above, site) + own for site, own in segment_slots(self.segment).items()}
        self.first_slot = _end(above, Site.DECODER_SELF)
        self.first_position = 0 if above is None else above.end_position
        self.ancestors = () if above is None else (*above.ancestors, above.id)
        self.heads = (() if above is None else above.heads) + (Head(self.id, self.end_slot),)
        own = len(self.segment.token_ids) if self.prompt is None else self.prompt.position_offset
        self.end_position = self.first_position + own

    @property
    def table(self) -> SlotTable:
        """Its slots in the decoder's self-attention."""
        return self.tables[Site.DECODER_SELF]

    @property
    def end_slot(self) -> int:
        """The slot index after its last one, in the decoder's self-attention."""
        return self.end_slots[Site.DECODER_SELF]

    @property
    def num_blocks(self) -> Counts:
        """Its own blocks at all sites, in each pool."""
        first, *others = [table.num_blocks for table in self.tables.values()]
        return sum(others, first)

    @property
    def is_ready(self) -> bool:
        """Whether all its keys and values exist, or will with the steps that are under way."""
        return self.num_computed == self.segment.num_slots and not self.needs_write

    @property
    def needs_write(self) -> bool:
        """Whether keys and values are to be put in as they are, which costs no forward pass."""
        return self.prompt is not None and self.prompt.kind == PromptKind.PREFIX

    def slots(self, site: Site) -> tuple[Slots, ...]:
        """Return the device slots of a site's groups up to its last one, its ancestors' included."""
        return self.tables[site].slots(self.end_slots[site])

    def own_slots(self) -> tuple[Slots, ...]:
        """Return the device slots of its own last slot indices in all groups, without its parent's."""
        own = segment_slots(self.segment)
        return tuple(
            slots[max(0, len(slots) - own[site]) :] for site in self.tables for slots in self.slots(site)
        )


def _end(above: Prefix | None, site: Site) -> int:
    return 0 if above is None else above.end_slots[site]


class PrefixCache:
    """All resident prefixes. Its costs don't grow with their number."""

    def __init__(self, blocks: KVBlocks) -> None:
        self._blocks = blocks
        self._prefixes: dict[Key, Prefix] = {}
        # Unpinned ones, least recently used first, descendants before their ancestors.
        self._idle: dict[Key, Prefix] = {}
        self.built: list[Prefix] = []  # in the step that was planned last
        self._expected: dict[Key, int] = {}  # of those that aren't kept: how many open requests need them
        self._resident_digests: frozenset[str] | None = frozenset()  # None: to be made again
        self.num_blocks: Counts = np.zeros(len(blocks.pools), np.int64)  # held by all prefixes
        self.num_idle_blocks = self.num_blocks.copy()  # of these, by those that may be evicted
        self.num_unfilled_slots = 0  # at the ends of their last blocks

    def __len__(self) -> int:
        return len(self._prefixes)

    def __iter__(self) -> Iterator[Prefix]:
        return iter(self._prefixes.values())

    def get(self, key: Key) -> Prefix | None:
        """Return the prefix of a key, built or under construction, if there is one."""
        return self._prefixes.get(key)

    def blocks_for(self, segment: Segment) -> Counts:
        """Return the most blocks that a segment's prefix holds at any time, in each pool."""
        counts = segment_slots(segment)
        first, *others = [self._blocks.blocks_for(counts[site], site) for site in self._blocks.sites]
        return sum(others, first)

    def create(
        self,
        key: Key,
        segment: Segment,
        parent: Prefix | None,
        prompt: Prompt | None,
        source: Source | None = None,
    ) -> Prefix:
        """Start a prefix, pinned once, with blocks for all of it; the caller has made room."""
        tables = {site: self._table(site, parent) for site in self._blocks.sites}
        prefix = Prefix(key, segment, parent, tables, prompt, segment.is_kept, source, pins=1)
        self._prefixes[key] = prefix
        self.num_unfilled_slots += self._unfilled_slots(prefix)
        self.grow(prefix)
        return prefix

    def _table(self, site: Site, parent: Prefix | None) -> SlotTable:
        head = None if parent is None else parent.tables[site]
        return SlotTable(self._blocks, head, _end(parent, site), site=site)

    def grow(self, prefix: Prefix) -> None:
        """Make room for what one step builds. What is written as it is needs none before its last slots."""
        before = prefix.num_blocks
        for site, table in prefix.tables.items():
            end = prefix.end_slots[site]
            is_computed = site is Site.DECODER_SELF and not prefix.needs_write
            grown = table.grow(prefix.first_slot + prefix.num_computed if is_computed else end, end)
            assert grown, "callers make room before they create"
        self._count(prefix, prefix.num_blocks - before)

    def advance(self, prefix: Prefix, num_slots: int) -> None:
        """Note that `num_slots` more exist; the prompt's bytes are dropped with the last."""
        prefix.num_computed += num_slots
        assert prefix.num_computed <= prefix.segment.num_slots
        if prefix.num_computed == prefix.segment.num_slots:
            prefix.prompt = None
            self._resident_digests = None
            self.built.append(prefix)

    def trim(self) -> None:
        """Give back what was needed to build prefixes only, when the step that built them is planned."""
        for prefix in self.built:
            before = prefix.num_blocks
            prefix.table.trim(prefix.end_slot)
            self._count(prefix, prefix.num_blocks - before)
        self.built.clear()

    def pin(self, line: Sequence[Prefix]) -> None:
        """Keep a line of prefixes, from a root on, for a sequence that stands on it."""
        for prefix in line:
            if not prefix.pins:
                del self._idle[prefix.key]
                self.num_idle_blocks -= prefix.num_blocks
            prefix.pins += 1

    def unpin(self, line: Sequence[Prefix]) -> None:
        """Let a line go: it becomes the most recently used, or goes where it is unfinished or no one's."""
        for prefix in reversed(line):
            assert prefix.pins > 0
            prefix.pins -= 1
            if prefix.pins:
                continue
            if self._outlives_pins(prefix):
                self._idle[prefix.key] = prefix
                self.num_idle_blocks += prefix.num_blocks
            else:
                self._remove(prefix)

    def discard(self, prefix: Prefix) -> None:
        """Keep a prefix and those on it no longer than they are pinned: its keys and values are wrong."""
        prefix.is_kept = False
        for each in [each for each in self._idle.values() if not self._outlives_pins(each)]:
            self._evict(each)

    def drop(self, prefix: Prefix) -> None:
        """Drop a prefix without pins, if it is still there: its keys and values may be wrong."""
        if self._idle.get(prefix.key) is prefix:
            self._evict(prefix)

    def expect(self, keys: Sequence[Key]) -> None:
        """Keep what comes under these keys, from a transient one on, for a request that isn't done."""
        for key in keys:
            self._expected[key] = self._expected.get(key, 0) + 1

    def forget(self, keys: Sequence[Key]) -> None:
        """Take back what `expect` noted for a request; with the last one unpinned ones go."""
        for key in reversed(keys):
            self._expected[key] -= 1
            if not self._expected[key]:
                del self._expected[key]
                if key in self._idle:
                    self._evict(self._idle[key])

    def _outlives_pins(self, prefix: Prefix) -> bool:
        """Return whether it stays when no sequence stands on it."""
        is_needed = prefix.is_kept or prefix.key in self._expected
        return prefix.is_ready and is_needed and (prefix.parent is None or self._outlives_pins(prefix.parent))

    def evict_until(self, num_free: Counts) -> bool:
        """Evict unpinned prefixes, oldest first, until `num_free` blocks of each pool are free.

        Return False, with nothing evicted, where that wouldn't be enough.
        """
        if (self._blocks.num_free + self.num_idle_blocks < num_free).any():
            return False
        while (self._blocks.num_free < num_free).any():
            self._evict(next(iter(self._idle.values())))
        return True

    def _evict(self, prefix: Prefix) -> None:
        del self._idle[prefix.key]
        self.num_idle_blocks -= prefix.num_blocks
        self._remove(prefix)

    def resident_digests(self) -> frozenset[str]:
        """Return the digests of the learned prompts that are ready on the device."""
        if self._resident_digests is None:
            ready = (prefix.segment.prompt_digest for prefix in self if prefix.is_ready)
            self._resident_digests = frozenset(digest for digest in ready if digest is not None)
        return self._resident_digests

    def _remove(self, prefix: Prefix) -> None:
        assert not prefix.pins
        self.num_blocks -= prefix.num_blocks
        for table in prefix.tables.values():
            table.release()
        del self._prefixes[prefix.key]
        self.num_unfilled_slots -= self._unfilled_slots(prefix)
        self._resident_digests = None

    def _unfilled_slots(self, prefix: Prefix) -> int:
        return sum(-count % self._blocks.block_size for count in segment_slots(prefix.segment).values())

    def _count(self, prefix: Prefix, added: Counts) -> None:
        self.num_blocks += added
        if prefix.key in self._idle:
            self.num_idle_blocks += added

    def check_integrity(self, lines: Sequence[Sequence[Prefix]]) -> None:
        """Assert that pins, blocks and the tree are conserved; `lines`: what each sequence stands on."""
        pins: dict[Key, int] = {}
        for prefix in (prefix for line in lines for prefix in line):
            pins[prefix.key] = pins.get(prefix.key, 0) + 1
        all_blocks, idle_blocks = np.zeros_like(self.num_blocks), np.zeros_like(self.num_blocks)
        for key, prefix in self._prefixes.items():
            assert prefix.key == key
            assert prefix.pins == pins.get(key, 0), "pins and their holders differ"
            is_ready, num_blocks = prefix.is_ready, prefix.num_blocks
            assert prefix.pins or is_ready, "an unfinished prefix without a user"
            assert (key in self._idle) == (not prefix.pins), "idle and unpinned are the same"
            for site, table in prefix.tables.items():
                is_built = is_ready or site is not Site.DECODER_SELF
                assert table.end >= (
                    prefix.end_slots[site] if is_built else prefix.first_slot + prefix.num_computed
                )
            all_blocks += num_blocks
            if not prefix.pins:
                idle_blocks += num_blocks
            assert prefix.source is None or prefix.source.users, "it attends to a source that is gone"
            above = prefix.parent
            assert above is None or self._prefixes.get(above.key) is above, "it stands on what is gone"
        assert not pins.keys() - self._prefixes.keys(), "a pinned prefix is gone"
        assert self._idle.keys() <= self._prefixes.keys()
        assert (self.num_blocks == all_blocks).all()
        assert (self.num_idle_blocks == idle_blocks).all()
        assert self.num_unfilled_slots == sum(map(self._unfilled_slots, self))
