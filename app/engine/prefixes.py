"""Resident prefixes: segments of prompts as keys and values, shared by reference.

Prefixes form a tree: each is one segment on those of its parent, so a request stands on a line of
them, from a root on. A prefix is built inside ordinary Plans (its tokens count against the token
budget), pinned while a running sequence stands on it, and kept afterwards until its blocks are
needed, least recently used first. Its key never holds a name (invariant 5).
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from app.engine.blocks import Counts, KVBlocks, SlotTable
from app.engine.plan import new_id
from app.models.attention.kv_cache import Slots
from app.prompt import ModelGeometry, Prompt, PromptKind
from app.request import Segment

Key = bytes


def prefix_keys(segments: Sequence[Segment], geometry: ModelGeometry) -> tuple[Key, ...]:
    """Return the key of each segment on those before it: the same key means the same keys and values."""
    key = hashlib.sha256(f"{geometry.fingerprint} {geometry.dtype}".encode()).digest()
    keys = []
    for segment in segments:
        learned = f"{segment.prompt_digest} {segment.num_virtual_tokens} ".encode()
        ids = np.array(segment.token_ids, dtype=np.int64).tobytes()
        key = hashlib.sha256(key + learned + ids).digest()
        keys.append(key)
    return tuple(keys)


@dataclass(eq=False)
class Prefix:
    """One resident segment and how far it is built.

    Positions differ from slots where a prompt's format counts virtual tokens as zero positions
    (Prompt.position_offset).
    """

    key: Key
    segment: Segment
    parent: "Prefix | None"
    table: SlotTable
    prompt: Prompt | None  # the learned one, until it is built
    is_kept: bool  # False: gone as soon as it has no pins
    num_computed: int = 0  # own slots whose keys and values exist
    pins: int = 0  # sequences that stand on it, or on one of its descendants
    id: int = field(default_factory=new_id)  # in Plans
    first_slot: int = field(init=False)
    first_position: int = field(init=False)
    end_position: int = field(init=False)  # the position of what follows
    ancestors: tuple[int, ...] = field(init=False)  # their ids

    def __post_init__(self) -> None:
        above = self.parent
        self.first_slot = 0 if above is None else above.end_slot
        self.first_position = 0 if above is None else above.end_position
        self.ancestors = () if above is None else (*above.ancestors, above.id)
        own = len(self.segment.token_ids) if self.prompt is None else self.prompt.position_offset
        self.end_position = self.first_position + own

    @property
    def end_slot(self) -> int:
        """The slot index after its last one."""
        return self.first_slot + self.segment.num_slots

    @property
    def is_ready(self) -> bool:
        """Whether all its keys and values exist, or will with the step that was planned last."""
        return self.num_computed == self.segment.num_slots

    @property
    def needs_write(self) -> bool:
        """Whether keys and values are to be put in as they are, which costs no forward pass."""
        return self.num_computed == 0 and self.prompt is not None and self.prompt.kind == PromptKind.PREFIX

    @property
    def outlives_pins(self) -> bool:
        """Whether it stays when no sequence stands on it."""
        return self.is_ready and self.is_kept and (self.parent is None or self.parent.outlives_pins)

    def own_slots(self) -> tuple[Slots, ...]:
        """Return the device slots of its own last slot indices, without its parent's."""
        return tuple(slots[-self.segment.num_slots :] for slots in self.table.slots(self.end_slot))


class PrefixCache:
    """All resident prefixes. Its costs don't grow with their number."""

    def __init__(self, blocks: KVBlocks) -> None:
        self._blocks = blocks
        self._prefixes: dict[Key, Prefix] = {}
        # Unpinned ones, least recently used first, descendants before their ancestors.
        self._idle: dict[Key, Prefix] = {}
        self._built: list[Prefix] = []  # in the step that was planned last
        self._resident_digests: frozenset[str] | None = frozenset()  # None: to be made again
        self.num_blocks: Counts = np.zeros(len(blocks.pools), np.int64)  # held by all prefixes
        self._num_idle_blocks = self.num_blocks.copy()

    def __len__(self) -> int:
        return len(self._prefixes)

    def __iter__(self) -> Iterator[Prefix]:
        return iter(self._prefixes.values())

    def get(self, key: Key) -> Prefix | None:
        """Return the prefix of a key, built or under construction, if there is one."""
        return self._prefixes.get(key)

    def create(self, key: Key, segment: Segment, parent: Prefix | None, prompt: Prompt | None) -> Prefix:
        """Start a prefix, pinned once, with blocks for all of it; the caller has made room."""
        table = (
            SlotTable(self._blocks)
            if parent is None
            else SlotTable(self._blocks, parent.table, parent.end_slot)
        )
        prefix = Prefix(key, segment, parent, table, prompt, segment.is_kept, pins=1)
        self._prefixes[key] = prefix
        self.grow(prefix)
        return prefix

    def grow(self, prefix: Prefix) -> None:
        """Make room for what one step builds. What is written as it is needs none before its last slots."""
        start = prefix.end_slot if prefix.needs_write else prefix.first_slot + prefix.num_computed
        before = prefix.table.num_blocks
        grown = prefix.table.grow(start, prefix.end_slot)
        assert grown, "callers make room before they create"
        self._count(prefix, prefix.table.num_blocks - before)

    def advance(self, prefix: Prefix, num_slots: int) -> None:
        """Note that `num_slots` more exist; the prompt's bytes are dropped with the last."""
        prefix.num_computed += num_slots
        assert prefix.num_computed <= prefix.segment.num_slots
        if prefix.is_ready:
            prefix.prompt = None
            self._resident_digests = None
            self._built.append(prefix)

    def trim(self) -> None:
        """Give back what was needed to build prefixes only, when the step that built them is planned."""
        for prefix in self._built:
            before = prefix.table.num_blocks
            prefix.table.trim(prefix.end_slot)
            self._count(prefix, prefix.table.num_blocks - before)
        self._built.clear()

    def pin(self, line: Sequence[Prefix]) -> None:
        """Keep a line of prefixes, from a root on, for a sequence that stands on it."""
        for prefix in line:
            if not prefix.pins:
                del self._idle[prefix.key]
                self._num_idle_blocks -= prefix.table.num_blocks
            prefix.pins += 1

    def unpin(self, line: Sequence[Prefix]) -> None:
        """Let a line go: it becomes the most recently used, or goes where it is unfinished or not kept."""
        for prefix in reversed(line):
            assert prefix.pins > 0
            prefix.pins -= 1
            if prefix.pins:
                continue
            if prefix.outlives_pins:
                self._idle[prefix.key] = prefix
                self._num_idle_blocks += prefix.table.num_blocks
            else:
                self._remove(prefix)

    def discard(self, prefix: Prefix) -> None:
        """Keep a prefix and those on it no longer than they are pinned: its keys and values are wrong."""
        prefix.is_kept = False
        for each in [each for each in self._idle.values() if not each.outlives_pins]:
            self._evict(each)

    def evict_until(self, num_free: Counts) -> bool:
        """Evict unpinned prefixes, oldest first, until `num_free` blocks of each pool are free.

        Return False, with nothing evicted, where that wouldn't be enough.
        """
        if (self._blocks.num_free + self._num_idle_blocks < num_free).any():
            return False
        while (self._blocks.num_free < num_free).any():
            self._evict(next(iter(self._idle.values())))
        return True

    def _evict(self, prefix: Prefix) -> None:
        del self._idle[prefix.key]
        self._num_idle_blocks -= prefix.table.num_blocks
        self._remove(prefix)

    def resident_digests(self) -> frozenset[str]:
        """Return the digests of the learned prompts that are ready on the device."""
        if self._resident_digests is None:
            ready = (prefix.segment.prompt_digest for prefix in self if prefix.is_ready)
            self._resident_digests = frozenset(digest for digest in ready if digest is not None)
        return self._resident_digests

    def _remove(self, prefix: Prefix) -> None:
        assert not prefix.pins
        self.num_blocks -= prefix.table.num_blocks
        prefix.table.release()
        del self._prefixes[prefix.key]
        self._resident_digests = None

    def _count(self, prefix: Prefix, added: Counts) -> None:
        self.num_blocks += added
        if prefix.key in self._idle:
            self._num_idle_blocks += added

    def check_integrity(self, lines: Sequence[Sequence[Prefix]]) -> None:
        """Assert that pins, blocks and the tree are conserved; `lines`: what each sequence stands on."""
        pins: dict[Key, int] = {}
        for prefix in (prefix for line in lines for prefix in line):
            pins[prefix.key] = pins.get(prefix.key, 0) + 1
        for key, prefix in self._prefixes.items():
            assert prefix.key == key
            assert prefix.pins == pins.get(key, 0), "pins and their holders differ"
            assert prefix.pins or prefix.is_ready, "an unfinished prefix without a user"
            assert (key in self._idle) == (not prefix.pins), "idle and unpinned are the same"
            assert prefix.table.end >= prefix.first_slot + prefix.num_computed
            above = prefix.parent
            assert above is None or self._prefixes.get(above.key) is above, "it stands on what is gone"
        assert not pins.keys() - self._prefixes.keys(), "a pinned prefix is gone"
        assert self._idle.keys() <= self._prefixes.keys()
        for count, prefixes in ((self.num_blocks, self), (self._num_idle_blocks, self._idle.values())):
            assert (count == sum(prefix.table.num_blocks for prefix in prefixes)).all()
