"""Free and held blocks of one memory, and what is to be copied between them before the next step."""

from collections.abc import Mapping, Sequence

import numpy as np

from app.models.attention.kv_cache import Slots


class BlockPool:
    """Free and held blocks of one memory."""

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks >= 2, "block 0 is reserved for padding"
        self.num_blocks = num_blocks - 1  # that can be held
        self._free = list(range(num_blocks - 1, 0, -1))
        self._holders: dict[int, int] = {}  # number of tables that hold each block that isn't free
        self._copies: dict[
            int, tuple[int, int]
        ] = {}  # target -> (source, its first slots), for the next step

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Hold `count` blocks; the caller has checked `num_free`."""
        assert count <= len(self._free), "callers check before they take"
        taken = [self._free.pop() for _ in range(count)]
        self._holders.update(dict.fromkeys(taken, 1))
        return taken

    def share(self, blocks: Sequence[int]) -> None:
        """Add a holder to blocks that are held."""
        for block in blocks:
            self._holders[block] += 1

    def is_shared(self, block: int) -> bool:
        """Return whether a held block has several holders."""
        return self._holders[block] > 1

    def give_back(self, blocks: Sequence[int]) -> None:
        """Take a holder from held blocks; without any they are free. A double free fails here."""
        assert self._holders.keys() >= set(blocks), "only held blocks can be freed"
        for block in blocks:
            self._holders[block] -= 1
            if not self._holders[block]:
                del self._holders[block]
                self._free.append(block)
                self._copies.pop(block, None)

    def replace(self, block: int, num_slots: int) -> int:
        """Return a new block for one that others hold too; its first slots are copied before a step."""
        (own,) = self.take(1)
        if num_slots:
            self._copies[own] = block, num_slots
        self.give_back([block])
        return own

    def take_copies(self, block_size: int) -> tuple[Slots, Slots]:
        """Return the slots to copy before the next step, and where to, `[n]` each; they are due once."""
        pairs = [
            (source * block_size + slot, target * block_size + slot)
            for target, (source, num_slots) in self._copies.items()
            for slot in range(num_slots)
        ]
        self._copies.clear()
        sources, targets = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        return sources, targets

    @property
    def num_copies(self) -> int:
        """Blocks of which slots are to be copied before the next step."""
        return len(self._copies)

    def check_integrity(self, holders: Mapping[int, int]) -> None:
        """Assert that free and held blocks add up, and that as many tables as noted hold each block.

        Cheap enough for every idle moment: it doesn't walk the free blocks.
        """
        assert len(self._free) + len(self._holders) == self.num_blocks, "a block is lost"
        assert self._holders == holders, "held blocks and their holders differ"
