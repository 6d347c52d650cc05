"""Sizes of the kernels' blocks. Nothing here needs Triton."""

from typing import NamedTuple

import torch

from app.prompt import LayerGeometry


class Blocks(NamedTuple):
    """How one launch of the attention kernel is cut."""

    rows: int  # of a tile: query tokens of an item, times the queries of a kv head
    keys: int
    num_warps: int
    num_stages: int


def row_blocks(geometry: LayerGeometry, dtype: torch.dtype) -> Blocks:
    """Return the sizes for items of one query token."""
    return Blocks(max(16, power_of_two(geometry.queries_per_kv)), 64, 4, 3)


def tile_blocks(geometry: LayerGeometry, dtype: torch.dtype) -> Blocks:
    """Return the sizes for items of several query tokens."""
    if dtype == torch.float32:
        return Blocks(max(32, power_of_two(geometry.queries_per_kv)), 32, 4, 2)
    return Blocks(max(64, power_of_two(geometry.queries_per_kv)), 64, 4, 3)


def queries_per_tile(geometry: LayerGeometry, dtype: torch.dtype) -> int:
    """Return how many query tokens an item may have."""
    return tile_blocks(geometry, dtype).rows // geometry.queries_per_kv


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is no less than `number`."""
    return 1 << (number - 1).bit_length()
