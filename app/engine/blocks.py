"""The block manager: fixed blocks of K/V slots, which tables hold them, and the proof that none is lost.

A block is `block_size` consecutive slots. A sequence or a resident prefix has a slot table, with a
part in each KV group. Tables that are forked from one another hold their blocks together; one that is
to write into a block that others hold gets a copy of it first. A group with a window gives blocks back
as its table moves on, and draws its blocks a chunk ahead. Block 0 of a pool is reserved for padding
(attention/kv_cache.py).
"""

import sys
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from app.engine.block_pool import BlockPool
from app.engine.plan import SlotCopies
from app.models.attention.kv_cache import KVGroup, Slots
from app.sites import Site

Counts = NDArray[np.int64]  # blocks of each pool


@dataclass(frozen=True, slots=True)
class TableGroup:
    """How a table covers one KV group: the rules of a window, in blocks."""

    number: int  # among the backbone's groups
    site: Site
    pool: int  # number of the pool that its blocks come from
    block_size: int
    block_bytes: int  # of a block in all layers of the group
    window: int | None  # slots that a query sees, itself included; None: all
    max_chunk: int  # slots that one step writes for a table, at most

    @property
    def max_blocks(self) -> int:
        """Blocks that a table holds at most: what its tokens can see, and a whole chunk."""
        if self.window is None:
            return sys.maxsize
        return -(-(self.window + self.max_chunk) // self.block_size) + 1

    @property
    def kept_blocks(self) -> int:
        """Blocks that a table holds at most while it grows by single tokens."""
        return sys.maxsize if self.window is None else -(-self.window // self.block_size) + 1

    def first_block(self, start: int) -> int:
        """Return the number of the first block that tokens from slot index `start` on may see.

        One slot more than the window is kept, since a step's last token may be taken again.
        """
        return 0 if self.window is None else max(0, start - self.window) // self.block_size


def table_groups(
    groups: Sequence[KVGroup], dtype: torch.dtype, *, block_size: int, max_chunk: int
) -> tuple[TableGroup, ...]:
    """Return how tables cover the groups of a backbone.

    Groups with as many layers of the same shapes draw from one pool: no split of memory is to be guessed.
    """
    pools: dict[tuple[int, ...], int] = {}
    found = []
    for number, group in enumerate(groups):
        layer = group.geometry
        shape = (layer.num_kv_heads, layer.key_dim, layer.value_dim, len(group.layers))
        pool = pools.setdefault(shape, len(pools))
        block_bytes = block_size * group.bytes_per_slot(dtype)
        found.append(TableGroup(number, group.site, pool, block_size, block_bytes, layer.window, max_chunk))
    return tuple(found)


def block_bytes(groups: Sequence[TableGroup]) -> Counts:
    """Return the bytes of a block of each pool."""
    sizes = {group.pool: group.block_bytes for group in groups}
    return np.array([sizes[pool] for pool in range(len(sizes))])


class KVBlocks:
    """All pools, and how tables draw from them; a table gets all that it asks for or nothing."""

    def __init__(self, groups: Sequence[TableGroup], num_blocks: Sequence[int]) -> None:
        """`num_blocks`: of each pool, the reserved one included."""
        self.groups = tuple(groups)
        self._at = {site: tuple(group for group in groups if group.site is site) for site in Site}
        self.sites = tuple(dict.fromkeys(group.site for group in groups))  # in the order of the groups
        self.block_size = groups[0].block_size
        self.pools = tuple(map(BlockPool, num_blocks))
        self.capacity: Counts = np.array([pool.num_blocks for pool in self.pools])
        self.block_bytes = block_bytes(groups)
        self.num_bytes = int(self.capacity @ self.block_bytes)
        own = self.at(Site.DECODER_SELF)
        self.bytes_per_token = sum(group.block_bytes for group in own) // self.block_size

    @property
    def num_free(self) -> Counts:
        return np.array([pool.num_free for pool in self.pools])

    @property
    def usage(self) -> float:
        """Share of blocks that are held, in the fullest pool."""
        return max(1 - pool.num_free / pool.num_blocks for pool in self.pools)

    def at(self, site: Site) -> tuple[TableGroup, ...]:
        """Return the groups of a site."""
        return self._at[site]

    def blocks_for(self, num_slots: int, site: Site = Site.DECODER_SELF) -> Counts:
        """Return the most blocks that a site's table of `num_slots` holds at any time, in each pool."""
        blocks = -(-num_slots // self.block_size)
        counts = np.zeros(len(self.pools), np.int64)
        for group in self.at(site):
            counts[group.pool] += min(blocks, group.max_blocks)
        return counts

    def take_copies(self) -> tuple[SlotCopies, ...]:
        """Return what is to be copied before the next step."""
        return tuple(
            SlotCopies(number, *pool.take_copies(self.block_size))
            for number, pool in enumerate(self.pools)
            if pool.num_copies
        )

    @property
    def num_copies(self) -> int:
        """Blocks that are to be copied before the next step."""
        return sum(pool.num_copies for pool in self.pools)

    def check_integrity(self, tables: Sequence["SlotTable"]) -> None:
        """Assert that the pools and all tables agree: a block has as many holders as tables that name it."""
        held: list[list[int]] = [[] for _ in self.pools]
        for table in tables:
            for part in table.parts:
                held[part.group.pool] += part.blocks
        for pool, blocks in zip(self.pools, held, strict=True):
            pool.check_integrity(blocks)


class _Part:
    """A table's blocks in one group: those numbered `first .. first + len(blocks)` of its own."""

    def __init__(self, group: TableGroup, begin: int) -> None:
        self.group = group
        self.blocks: list[int] = []
        self.first = 0
        self._begin = begin  # slot index at which block number 0 begins
        self.slots: Slots = np.empty(0, np.int64)  # ends with the last block; may begin with a head's
        self.slots_begin = begin  # the slot index of the first of them

    @property
    def end(self) -> int:
        """The slot index at which its blocks end."""
        return self._begin + (self.first + len(self.blocks)) * self.group.block_size

    @property
    def trim_at(self) -> int:
        """The slot index from which on no token sees its first block."""
        group = self.group
        if group.window is None:
            return sys.maxsize
        return self._begin + (self.first + 1) * group.block_size + group.window

    def span(self, start: int, end: int) -> tuple[int, int]:
        """Return where its blocks are to begin and to end for tokens at slot indices `start .. end`."""
        first = max(self.first, self.group.first_block(start - self._begin))
        needed = -(-(end - self._begin) // self.group.block_size)
        return first, max(self.first + len(self.blocks), min(needed, first + self.group.max_blocks))

    def give_back(self, first: int, pool: BlockPool) -> None:
        """Give back the blocks before number `first`."""
        if first > self.first:
            num_slots = max(0, self.end - self._begin - first * self.group.block_size)
            self.slots = self.slots[len(self.slots) - num_slots :]
            self.slots_begin = self._begin + first * self.group.block_size
            gone, self.blocks = self.blocks[: first - self.first], self.blocks[first - self.first :]
            self.first = first
            pool.give_back(gone)

    def extend(self, last: int, pool: BlockPool) -> None:
        """Take blocks up to number `last`."""
        taken = pool.take(last - self.first - len(self.blocks))
        if not taken:
            return
        starts = np.array(taken, dtype=np.int64)[:, None] * self.group.block_size
        added = (starts + np.arange(self.group.block_size)).reshape(-1)
        self.slots = np.concatenate([self.slots, added])
        self.blocks.extend(taken)

    def num_missing(self, start: int, end: int, pool: BlockPool) -> int:
        """Return how many free blocks less there are when it has moved on to tokens at `start .. end`."""
        first, last = self.span(start, end)
        gone = self.blocks[: first - self.first]
        num_shared = sum(map(pool.is_shared, gone))  # which stay held
        return last - first - len(self.blocks) + num_shared

    def fork(self, pool: BlockPool) -> "_Part":
        """Return another one that holds the same blocks."""
        twin = copy(self)
        twin.blocks = self.blocks.copy()
        pool.share(self.blocks)
        return twin

    def covers(self, start: int) -> bool:
        """Return whether it still has all that tokens from slot index `start` on may see of its own."""
        return self.first <= self.group.first_block(start - self._begin)

    def cut(self, end: int, pool: BlockPool) -> None:
        """Give back the blocks that begin at slot index `end` or later."""
        num_kept = max(0, -(-(end - self._begin) // self.group.block_size) - self.first)
        gone, self.blocks = self.blocks[num_kept:], self.blocks[:num_kept]
        self.slots = self.slots[: len(self.slots) - len(gone) * self.group.block_size]
        pool.give_back(gone)

    def shared(self, start: int, pool: BlockPool) -> list[int]:
        """Return which of its blocks others hold too, from that of slot index `start` on."""
        first = max(0, (start - self._begin) // self.group.block_size - self.first)
        return [index for index in range(first, len(self.blocks)) if pool.is_shared(self.blocks[index])]

    def replace_shared(self, start: int, pool: BlockPool) -> None:
        """Get blocks of its own for tokens from slot index `start` on, with what stands before it in them."""
        size = self.group.block_size
        for index in self.shared(start, pool):
            num_kept = max(0, start - self._begin - (self.first + index) * size)
            self.blocks[index] = own = pool.replace(self.blocks[index], num_kept)
            place = len(self.slots) - (len(self.blocks) - index) * size
            self.slots = self.slots.copy()  # Plans and forks have views of it
            self.slots[place : place + size] = np.arange(own * size, (own + 1) * size)

    def join(self, head: Slots) -> None:
        """Put a head's slots before its own, as far as tokens from here on may see them."""
        if not self.first:
            kept = head[-(self.group.window or len(head)) :]
            self.slots = np.concatenate([kept, self.slots])
            self.slots_begin -= len(kept)


class SlotTable:
    """The device slots of one holder at one site: a shared head that it only reads, then its own blocks.

    The head's slots are looked up with the first that are asked for: by then it is complete.
    """

    def __init__(
        self,
        kv: KVBlocks,
        head: Self | None = None,
        head_slots: int = 0,
        *,
        site: Site = Site.DECODER_SELF,
    ) -> None:
        self._kv = kv
        self._head = head
        self._head_slots = head_slots
        self._is_joined = head is None
        self.parts = tuple(_Part(group, head_slots) for group in kv.at(site))
        self.end = head_slots  # the slot index up to which every group has room
        self._trim_at = head_slots  # tokens from this slot index on leave a block of a window group behind
        self._is_forked = False  # since it grew last

    def fork(self) -> Self:
        """Return another table over the same slots. Each copies a block that it writes into when it grows."""
        twin = copy(self)
        twin.parts = tuple(part.fork(self._pool(part)) for part in self.parts)
        self._is_forked = twin._is_forked = True
        return twin

    def fork_before(self, end: int) -> Self | None:
        """Return a fork for tokens from slot index `end` on; None: a window gave back what they see."""
        if not self.covers(end):
            return None
        twin = self.fork()
        for part in twin.parts:
            part.cut(end, self._pool(part))
        twin.end = min(part.end for part in twin.parts)
        return twin

    def covers(self, start: int) -> bool:
        """Return whether no window gave back what tokens from slot index `start` on may see."""
        return all(part.covers(start) for part in self.parts)

    @property
    def num_blocks(self) -> Counts:
        """Its own blocks, in each pool."""
        counts = np.zeros(len(self._kv.pools), np.int64)
        for part in self.parts:
            counts[part.group.pool] += len(part.blocks)
        return counts

    def missing_blocks(self, start: int, end: int) -> Counts:
        """Return the blocks that `grow` takes from each pool; negative where it gives some back."""
        counts = np.zeros(len(self._kv.pools), np.int64)
        for part in self.parts:
            pool = self._pool(part)
            counts[part.group.pool] += part.num_missing(start, end, pool)
            if self._is_forked:
                counts[part.group.pool] += len(part.shared(start, pool))
        return counts

    def grow(self, start: int, end: int) -> bool:
        """Make room for tokens at slot indices `start .. end`, and keep what they may see.

        A window group gets room for a chunk from `start` on, and gives back what no token from there
        on can see. Return False, with nothing changed, when blocks run out.
        """
        if end <= self.end and start < self._trim_at and not self._is_forked:
            return True
        if (self.missing_blocks(start, end) > self._kv.num_free).any():
            return False
        self._move(start, end)
        return True

    def trim(self, start: int) -> None:
        """Give back what no token from slot index `start` on can see."""
        self._move(start, start)

    def slots(self, num_slots: int) -> tuple[Slots, ...]:
        """Return the device slots of each group, of the last slot indices before `num_slots` (views).

        A group without a window has all of them, one with a window at least those that tokens which
        it was grown for may see.
        """
        if not self._is_joined:
            assert self._head is not None
            for part, head in zip(self.parts, self._head.slots(self._head_slots), strict=True):
                part.join(head)
            self._is_joined = True
        return tuple([part.slots[: num_slots - part.slots_begin] for part in self.parts])

    def release(self) -> None:
        """Give all own blocks back; the head belongs to another holder. The table ends with it."""
        for part in self.parts:
            self._pool(part).give_back(part.blocks)
        self.parts = ()

    def _pool(self, part: _Part) -> BlockPool:
        return self._kv.pools[part.group.pool]

    def _move(self, start: int, end: int) -> None:
        spans = [part.span(start, end) for part in self.parts]
        for part, (first, _) in zip(self.parts, spans, strict=True):  # one group may take what another gives
            part.give_back(first, self._pool(part))
        if self._is_forked:
            for part in self.parts:
                part.replace_shared(start, self._pool(part))
            self._is_forked = False
        for part, (_, last) in zip(self.parts, spans, strict=True):
            part.extend(last, self._pool(part))
        self.end = min((part.end for part in self.parts), default=self.end)
        self._trim_at = min((part.trim_at for part in self.parts), default=self._trim_at)
