"""What the attention kernel is compiled for: sizes of its blocks, and flags. Nothing here needs Triton.

The figures are those of `python -m app.models.cuda.resources` for an H200: 132 multiprocessors, each with
65,536 registers and 227 KB of shared memory, and 4.3 TB/s for all of them: to keep them busy takes about
40 KB on their way to each.
"""

from typing import NamedTuple

import torch

from app.prompt import LayerGeometry


class Blocks(NamedTuple):
    """How a launch of the attention kernel is cut."""

    rows: int  # M of a tile: query tokens of an item, times the queries of a kv head
    keys: int  # N, at most 64: parts of a context begin at multiples of 64
    num_warps: int
    num_stages: int  # one more than blocks of keys and values that are in shared memory


def row_blocks(geometry: LayerGeometry, dtype: torch.dtype) -> Blocks:
    """Return the sizes for items of one query token, which wait for memory."""
    rows = max(16, power_of_two(geometry.queries_per_kv))
    if dtype == torch.float32:
        return Blocks(rows, 16, *((4, 3) if max(rows, _width(geometry) // 8) <= 16 else (8, 2)))
    return Blocks(rows, 64 if _width(geometry) <= 128 else 32, 4, 3)


def tile_blocks(geometry: LayerGeometry, dtype: torch.dtype) -> Blocks:
    """Return the sizes for items of several query tokens, which compute."""
    rows = power_of_two(geometry.queries_per_kv)
    if dtype == torch.float32:  # without matrix units
        return Blocks(max(32, rows), 16, 8, 2)
    return Blocks(max(64, rows), *((64, 4, 3) if _width(geometry) <= 128 else (32, 8, 3)))


def queries_per_tile(geometry: LayerGeometry, dtype: torch.dtype) -> int:
    """Return how many query tokens an item may have."""
    return tile_blocks(geometry, dtype).rows // geometry.queries_per_kv


def constants(geometry: LayerGeometry, blocks: Blocks, *, is_row: bool) -> dict[str, int | bool]:
    """Return what `attend` is compiled for. A row sees all keys of its item, so it needs no mask."""
    return {
        "NUM_KV_HEADS": geometry.num_kv_heads,
        "GROUP": geometry.queries_per_kv,
        "KEY_DIM": geometry.key_dim,
        "VALUE_DIM": geometry.value_dim,
        "IS_CAUSAL": geometry.is_causal and not is_row,
        "HAS_WINDOW": geometry.window is not None,
        "HAS_SOFTCAP": geometry.softcap is not None,
        "HAS_SINKS": geometry.has_sinks,
        "HAS_BIAS": geometry.has_position_bias,
        "BLOCK_M": blocks.rows,
        "BLOCK_N": blocks.keys,
        "BLOCK_D": max(16, power_of_two(geometry.key_dim)),
        "BLOCK_DV": max(16, power_of_two(geometry.value_dim)),
    }


def merge_constants(geometry: LayerGeometry) -> dict[str, int | bool]:
    """Return what `merge` is compiled for."""
    return {
        "NUM_HEADS": geometry.num_kv_heads * geometry.queries_per_kv,
        "VALUE_DIM": geometry.value_dim,
        "HAS_SINKS": geometry.has_sinks,
        "BLOCK_P": 16,
        "BLOCK_DV": power_of_two(geometry.value_dim),
    }


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is no less than `number`."""
    return 1 << (number - 1).bit_length()


def _width(geometry: LayerGeometry) -> int:
    return power_of_two(max(geometry.key_dim, geometry.value_dim))
