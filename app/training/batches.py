"""Which examples a batch holds: a function of seed and batch number, so that a run goes on at any batch."""

import itertools
import random
from collections.abc import Sequence

_MOST_GROUPED = 50  # batches whose examples are sorted by length together
_FEWEST_GROUPS = 4  # of an epoch, where it has so many batches: lengths mix within few examples too


class BatchOrder:
    """Endless shuffled epochs, in batches of examples of like length.

    The batches of an epoch differ in size by one example at most, so that none is left with a few.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths = lengths
        self._seed = seed
        self.num_batches = -(-len(lengths) // batch_size)  # of an epoch
        self._epoch = -1
        self._batches: list[list[int]] = []

    def batch(self, number: int) -> list[int]:
        """Return the indices of the examples of batch `number`, from 0 on."""
        epoch, index = divmod(number, self.num_batches)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._shuffled(epoch)
        return self._batches[index]

    def _shuffled(self, epoch: int) -> list[list[int]]:
        chance = random.Random(f"batches of epoch {epoch}, seed {self._seed}")
        order = list(range(len(self._lengths)))
        chance.shuffle(order)
        batches = [
            batch for first in range(0, self.num_batches, self._group) for batch in self._cut(order, first)
        ]
        chance.shuffle(batches)
        return batches

    @property
    def _group(self) -> int:
        """Batches that are sorted together."""
        return max(1, min(self.num_batches // _FEWEST_GROUPS, _MOST_GROUPED))

    def _cut(self, order: list[int], first: int) -> list[list[int]]:
        """Return the batches of the group that begins with batch `first`."""
        count = len(order)
        last = min(first + self._group, self.num_batches)
        bounds = [number * count // self.num_batches for number in range(first, last + 1)]
        group = sorted(order[bounds[0] : bounds[-1]], key=self._lengths.__getitem__)
        return [group[start - bounds[0] : end - bounds[0]] for start, end in itertools.pairwise(bounds)]
