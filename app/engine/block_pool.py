"""Free and held blocks of one memory, and what is to be copied between them before the next step."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from app.models.attention.kv_cache import Slots


class BlockPool:
    """Free and held blocks of one memory."""

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks >= 2, "block 0 is reserved for padding"
        self.num_blocks = num_blocks - 1  # that can be held
        self._free = list(range(num_blocks - 1, 0, -1))
        self._held: set[int] = set()
        self._sharers: dict[int, int] = {}  # of held blocks, how many tables hold each beside the first
        # By target: a source and how many of its first slots to copy for the next step.
        self._copies: dict[int, tuple[int, int]] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Hold `count` blocks; the caller has checked `num_free`."""
        assert count <= len(self._free), "callers check before they take"
        taken = [self._free.pop() for _ in range(count)]
        self._held.update(taken)
        return taken

    def share(self, blocks: Sequence[int]) -> None:
        """Add a holder to blocks that are held."""
        assert self._held.issuperset(blocks), "only held blocks can be shared"
        for block in blocks:
            self._sharers[block] = self._sharers.get(block, 0) + 1

    def is_shared(self, block: int) -> bool:
        """Return whether a held block has several holders."""
        return block in self._sharers

    def give_back(self, blocks: Sequence[int]) -> None:
        """Take a holder from held blocks; without any they are free. A double free fails here."""
        assert self._held.issuperset(blocks), "only held blocks can be freed"
        if self._sharers:
            blocks = [block for block in blocks if not self._leave(block)]
        self._held.difference_update(blocks)
        self._free.extend(blocks)
        if self._copies:
            for block in blocks:
                self._copies.pop(block, None)

    def _leave(self, block: int) -> bool:
        """Take one from the tables that hold a block beside the first; return whether there was one."""
        others = self._sharers.pop(block, 0)
        if others > 1:
            self._sharers[block] = others - 1
        return others > 0

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

    def check_integrity(self, blocks: Sequence[int]) -> None:
        """Assert that free and held blocks add up, and that as many tables as noted hold each block.

        `blocks`: those of all tables, each as often as there are tables that hold it.

        Cheap enough for every idle moment: it doesn't walk the free blocks.
        """
        assert len(self._free) + len(self._held) == self.num_blocks, "a block is lost"
        held = set(blocks)
        assert self._held == held, "held blocks and their holders differ"
        shared = Counter(blocks) - Counter(held) if len(blocks) > len(held) else {}
        assert self._sharers == shared, "shared blocks and their holders differ"
