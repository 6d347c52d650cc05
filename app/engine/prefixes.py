"""Resident prefixes: a prompt and leading text as keys and values, shared by reference.

A prefix is built inside ordinary Plans (its tokens count against the token budget), pinned while
a running sequence uses it, and kept afterwards until its blocks are needed, least recently used
first. Its key never holds a name (invariant 5).
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from app.engine.blocks import Counts, KVBlocks, SlotTable
from app.engine.plan import new_id
from app.prompt import ModelGeometry, Prompt, PromptKind
from app.request import Request


@dataclass(frozen=True, slots=True)
class PrefixKey:
    """What makes two prefixes the same keys and values."""

    fingerprint: str
    dtype: str
    prompt_digest: str | None
    num_virtual_tokens: int
    ids_digest: str


def prefix_key(request: Request, geometry: ModelGeometry) -> PrefixKey | None:
    """The prefix that a request stands on; None where it has none."""
    if not request.num_prefix_slots:
        return None
    ids = np.array(request.resident_ids, dtype=np.int64).tobytes()
    return PrefixKey(
        geometry.fingerprint,
        geometry.dtype,
        request.prompt_digest,
        request.num_virtual_tokens,
        hashlib.sha256(ids).hexdigest(),
    )


@dataclass(eq=False)
class Prefix:
    """One resident prefix and how far it is built.

    Slots: first the virtual tokens, then the resident ids. Positions differ from slots where the
    format counts virtual tokens as zero positions (Prompt.position_offset).
    """

    key: PrefixKey
    resident_ids: tuple[int, ...]
    num_virtual_tokens: int
    table: SlotTable
    prompt: Prompt | None  # until it is built
    is_kept: bool = True  # False: gone as soon as nobody pins it
    virtual_positions: int = 0  # positions that the virtual tokens take
    num_computed: int = 0  # slots whose keys and values exist
    pins: int = 0
    id: int = field(default_factory=new_id)  # in Plans

    @property
    def num_slots(self) -> int:
        return self.num_virtual_tokens + len(self.resident_ids)

    @property
    def is_ready(self) -> bool:
        return self.num_computed == self.num_slots

    @property
    def needs_write(self) -> bool:
        """Whether keys and values are to be put in as they are, which costs no forward pass."""
        return self.num_computed == 0 and self.prompt is not None and self.prompt.kind == PromptKind.PREFIX

    def position_of(self, slot: int) -> int:
        """The position that the model sees for a token in `slot`."""
        if slot < self.num_virtual_tokens:
            return slot
        return slot - self.num_virtual_tokens + self.virtual_positions


class PrefixCache:
    """All resident prefixes. Its costs don't grow with their number."""

    def __init__(self, blocks: KVBlocks) -> None:
        self._blocks = blocks
        self._prefixes: dict[PrefixKey, Prefix] = {}
        self._idle: dict[PrefixKey, Prefix] = {}  # unpinned ones, least recently used first
        self._built: list[Prefix] = []  # in the step that was planned last
        self._resident_digests: frozenset[str] | None = frozenset()  # None: to be made again
        self.num_blocks: Counts = np.zeros(len(blocks.pools), np.int64)  # held by all prefixes
        self._num_idle_blocks = self.num_blocks.copy()

    def __len__(self) -> int:
        return len(self._prefixes)

    def __iter__(self) -> Iterator[Prefix]:
        return iter(self._prefixes.values())

    def get(self, key: PrefixKey) -> Prefix | None:
        return self._prefixes.get(key)

    def create(self, key: PrefixKey, request: Request, prompt: Prompt | None) -> Prefix:
        """Start a prefix, pinned, with blocks for all of it; the caller has made room."""
        table = SlotTable(self._blocks)
        prefix = Prefix(
            key=key,
            resident_ids=request.resident_ids,
            num_virtual_tokens=request.num_virtual_tokens,
            table=table,
            prompt=prompt,
            is_kept=request.keeps_prefix,
            virtual_positions=prompt.position_offset if prompt is not None else 0,
            pins=1,
        )
        self._prefixes[key] = prefix
        self.grow(prefix)
        return prefix

    def grow(self, prefix: Prefix) -> None:
        """Make room for what one step builds. What is written as it is needs none before its last slots."""
        start = prefix.num_virtual_tokens if prefix.needs_write else prefix.num_computed
        before = prefix.table.num_blocks
        grown = prefix.table.grow(start, prefix.num_slots)
        assert grown, "callers make room before they create"
        self._count(prefix, prefix.table.num_blocks - before)

    def advance(self, prefix: Prefix, num_slots: int) -> None:
        """Note that `num_slots` more exist; the prompt's bytes are dropped with the last."""
        prefix.num_computed += num_slots
        assert prefix.num_computed <= prefix.num_slots
        if prefix.is_ready:
            prefix.prompt = None
            self._resident_digests = None
            self._built.append(prefix)

    def trim(self) -> None:
        """Give back what was needed to build prefixes only, when the step that built them is planned."""
        for prefix in self._built:
            before = prefix.table.num_blocks
            prefix.table.trim(prefix.num_slots)
            self._count(prefix, prefix.table.num_blocks - before)
        self._built.clear()

    def pin(self, prefix: Prefix) -> None:
        if not prefix.pins:
            del self._idle[prefix.key]
            self._num_idle_blocks -= prefix.table.num_blocks
        prefix.pins += 1

    def unpin(self, prefix: Prefix) -> None:
        """Let go; a prefix that nobody waits for is not built further, nor kept where nobody will come."""
        assert prefix.pins > 0
        prefix.pins -= 1
        if prefix.pins:
            return
        if prefix.is_ready and prefix.is_kept:
            self._idle[prefix.key] = prefix  # the most recently used
            self._num_idle_blocks += prefix.table.num_blocks
        else:
            self._remove(prefix)

    def discard(self, prefix: Prefix) -> None:
        """Keep a prefix no longer than it is pinned: what it holds is not what it should."""
        prefix.is_kept = False
        if self._idle.get(prefix.key) is prefix:
            self._evict(prefix)

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
        """Digests of the prompts that are ready on the device."""
        if self._resident_digests is None:
            ready = (prefix.key.prompt_digest for prefix in self if prefix.is_ready)
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

    def check_integrity(self, pins: dict[PrefixKey, int]) -> None:
        """`pins`: how many sequences hold each prefix."""
        for key, prefix in self._prefixes.items():
            assert prefix.key == key
            assert prefix.pins == pins.get(key, 0), "pins and their holders differ"
            assert prefix.pins or prefix.is_ready, "an unfinished prefix that nobody waits for"
            assert (key in self._idle) == (not prefix.pins), "idle and unpinned are the same"
            assert prefix.table.end >= prefix.num_computed
        assert not pins.keys() - self._prefixes.keys(), "a pinned prefix is gone"
        assert self._idle.keys() <= self._prefixes.keys()
        for count, prefixes in ((self.num_blocks, self), (self._num_idle_blocks, self._idle.values())):
            assert (count == sum(prefix.table.num_blocks for prefix in prefixes)).all()
