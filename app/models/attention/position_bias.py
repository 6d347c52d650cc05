"""Biases of attention scores by the distance of key and query, laid out for torch.

A bias is a table `[H, 2M + 1]`: distances -M to M, beyond which the ends count (T5). Shapes: H heads, R rows
of one token, n tokens of a chunk, C context slots.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Biases that are held at once of a chunk (float32: 4 MiB), however long it is.
_MAX_BIASES = 1 << 20


@dataclass(frozen=True, slots=True)
class RowDistances:
    """Distances of all keys from the only query of each row of a bucket."""

    distances: Tensor  # [R, C]

    @classmethod
    def of(cls, lengths: Tensor, context: int) -> "RowDistances":
        """`lengths [R]`: slots of each row, of which the last is the query's own."""
        return cls(torch.arange(context, device=lengths.device) - (lengths[:, None] - 1))

    def biases(self, table: Tensor) -> Tensor:
        """Return additive biases `[R, H, 1, C]`."""
        found = table.index_select(1, _columns(table, self.distances.flatten()))
        return found.view(-1, *self.distances.shape).transpose(0, 1).unsqueeze(2)


@dataclass(frozen=True, slots=True)
class ChunkDistances:
    """Every distance between a key and one of a chunk's queries, once: biases repeat along diagonals."""

    context: int
    distances: Tensor  # [C + n - 1], ascending; the last query sees the first C of them
    hidden: Tensor | None  # [C + n - 1] bool: those that no query may see; None: all are seen

    @classmethod
    def of(
        cls, num_tokens: int, context: int, *, is_causal: bool, window: int | None, device: torch.device
    ) -> "ChunkDistances":
        """Lay out a chunk's queries, which are the last `num_tokens` of the `context` slots."""
        distances = torch.arange(1 - context, num_tokens, device=device)
        hidden = distances > 0 if is_causal else None
        if hidden is not None and window is not None:
            hidden |= distances <= -window
        return cls(context, distances, hidden)

    def blocks(self, table: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield consecutive queries, and their additive masks `[1, H, queries, C]`."""
        line = table.index_select(1, _columns(table, self.distances))
        if self.hidden is not None:
            line = line.masked_fill(self.hidden, float("-inf"))
        windows = line.unfold(1, self.context, 1)  # [H, n, C], the last query first
        heads, num_queries, context = windows.shape
        size = max(1, _MAX_BIASES // (heads * context))
        for begin in range(0, num_queries, size):
            end = min(begin + size, num_queries)
            block = windows[:, num_queries - end : num_queries - begin].flip(1)
            yield slice(begin, end), block.unsqueeze(0)


def _columns(table: Tensor, distances: Tensor) -> Tensor:
    furthest = table.shape[1] // 2
    return distances.clamp(-furthest, furthest) + furthest
