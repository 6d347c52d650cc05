"""Fixed blocks of K/V slots, who holds them, and the proof that none is lost.

A block is `block_size` consecutive slots. Each KV group has its own pool. Block 0 is reserved:
its slots stay zero and padding reads them (attention/kv_cache.py).
"""

from collections.abc import Sequence
from typing import Self

import numpy as np

from app.models.attention.kv_cache import Slots


class BlockPool:
    """Free and held blocks of one KV group."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks >= 2, "block 0 is reserved for padding"
        self.block_size = block_size
        self.num_blocks = num_blocks - 1  # that can be held
        self._free = list(range(num_blocks - 1, 0, -1))
        self._held: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Hold `count` blocks; the caller has checked `num_free`."""
        assert count <= len(self._free), "callers check before they take"
        taken = [self._free.pop() for _ in range(count)]
        self._held.update(taken)
        return taken

    def give_back(self, blocks: Sequence[int]) -> None:
        """Free blocks that are held; a double free is a bug and fails here."""
        assert self._held.issuperset(blocks), "only held blocks can be freed"
        self._held.difference_update(blocks)
        self._free.extend(blocks)

    def check_integrity(self, expected_held: set[int]) -> None:
        """Free and held blocks add up, and the holders know of exactly the held ones.

        Cheap enough for every idle moment: it doesn't walk the free blocks.
        """
        assert len(self._free) + len(self._held) == self.num_blocks, "a block is lost"
        assert self._held == expected_held, "held blocks and their holders differ"


class KVBlocks:
    """The pools of all KV groups; allocation is all groups or none."""

    def __init__(self, num_blocks: Sequence[int], block_size: int) -> None:
        self.block_size = block_size
        self.pools = tuple(BlockPool(count, block_size) for count in num_blocks)

    @property
    def capacity(self) -> int:
        """Blocks that one sequence can hold when it is alone."""
        return min(pool.num_blocks for pool in self.pools)

    @property
    def num_free(self) -> int:
        """Blocks that every group can still give."""
        return min(pool.num_free for pool in self.pools)

    @property
    def usage(self) -> float:
        """Share of blocks that are held, in the fullest group."""
        return max(1 - pool.num_free / pool.num_blocks for pool in self.pools)

    def blocks_for(self, num_slots: int) -> int:
        return -(-num_slots // self.block_size)

    def check_integrity(self, tables: Sequence["SlotTable"]) -> None:
        """The pools and the given holders agree, and no block has two holders."""
        for number, pool in enumerate(self.pools):
            held = [block for table in tables for block in table.blocks[number]]
            assert len(held) == len(set(held)), "a block has two holders"
            pool.check_integrity(set(held))


class SlotTable:
    """The device slots of one holder: a shared head that it only reads, then its own blocks."""

    def __init__(self, pools: KVBlocks, head: Self | None = None, head_slots: int = 0) -> None:
        self._kv = pools
        self._head_slots = head_slots
        self.blocks: tuple[list[int], ...] = tuple([] for _ in pools.pools)
        heads = head.slots(head_slots) if head is not None else (np.empty(0, np.int64),) * len(pools.pools)
        self._slots = [np.array(slots, dtype=np.int64) for slots in heads]

    @property
    def num_slots(self) -> int:
        """Slots that exist, the head's included."""
        return self._head_slots + len(self.blocks[0]) * self._kv.block_size

    def missing_blocks(self, num_slots: int) -> int:
        """Blocks that have to be added for `num_slots` in all."""
        return max(0, self._kv.blocks_for(num_slots - self._head_slots) - len(self.blocks[0]))

    def grow(self, num_slots: int) -> bool:
        """Make room for `num_slots` in all; False, with nothing taken, when blocks run out."""
        count = self.missing_blocks(num_slots)
        if count > self._kv.num_free:
            return False
        for number, pool in enumerate(self._kv.pools if count else ()):
            taken = pool.take(count)
            self.blocks[number].extend(taken)
            starts = np.array(taken, dtype=np.int64)[:, None] * pool.block_size
            added = (starts + np.arange(pool.block_size)).reshape(-1)
            self._slots[number] = np.concatenate([self._slots[number], added])
        return True

    def slots(self, num_slots: int) -> tuple[Slots, ...]:
        """Per group, the device slots of slot indices `0 .. num_slots` (views)."""
        return tuple(slots[:num_slots] for slots in self._slots)

    def release(self) -> None:
        """Give all own blocks back; the head belongs to somebody else."""
        for pool, blocks in zip(self._kv.pools, self.blocks, strict=True):
            pool.give_back(blocks)
            blocks.clear()
        self._slots = [slots[: self._head_slots] for slots in self._slots]
