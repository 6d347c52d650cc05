"""The write of a step's keys and values to their slots, as one Triton kernel.

Shapes: T tokens, Hk kv heads, D key width, Dv value width, S slots of the pools.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from app.models.cuda.blocks import power_of_two


@triton.jit
def write(
    keys,  # [T, Hk, D], of any strides but 1 along D
    values,  # [T, Hk, Dv], likewise
    key_pool,  # [S, Hk * D]
    value_pool,  # [S, Hk * Dv]
    slots,  # [T] int64
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    NUM_KV_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Copy one token's keys or, in the second row of the grid, its values."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if tl.program_id(1) == 0:
        source = keys + token * key_token_stride
        target = key_pool + slot * (NUM_KV_HEADS * KEY_DIM)
        _copy(source, key_head_stride, target, NUM_KV_HEADS, KEY_DIM, BLOCK_HEADS, BLOCK_D)
    else:
        source = values + token * value_token_stride
        target = value_pool + slot * (NUM_KV_HEADS * VALUE_DIM)
        _copy(source, value_head_stride, target, NUM_KV_HEADS, VALUE_DIM, BLOCK_HEADS, BLOCK_DV)


@triton.jit
def _copy(
    source,
    head_stride,
    target,
    NUM_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    heads = tl.arange(0, BLOCK_HEADS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    is_number = (heads < NUM_HEADS) & (columns < WIDTH)
    numbers = tl.load(source + heads * head_stride + columns, mask=is_number)
    tl.store(target + heads * WIDTH + columns, numbers, mask=is_number)


def write_rows(pools: tuple[Tensor, Tensor], slots: Tensor, keys: Tensor, values: Tensor) -> None:
    """Store `keys [T, Hk, D]` and `values [T, Hk, Dv]` at `slots [T]` of a layer's pools."""
    keys, values = (rows if rows.stride(2) == 1 else rows.contiguous() for rows in (keys, values))
    num_tokens, num_kv_heads, key_dim = keys.shape
    with torch.cuda.device_of(keys):  # type: ignore[no-untyped-call]
        write[(num_tokens, 2)](
            keys,
            values,
            *pools,
            slots,
            *keys.stride()[:2],
            *values.stride()[:2],
            **write_constants(num_kv_heads, key_dim, values.shape[2]),
            num_warps=write_warps(num_kv_heads, key_dim, values.shape[2]),
        )


def write_constants(num_kv_heads: int, key_dim: int, value_dim: int) -> dict[str, int]:
    """Return what `write` is compiled for."""
    return {
        "NUM_KV_HEADS": num_kv_heads,
        "KEY_DIM": key_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_HEADS": power_of_two(num_kv_heads),
        "BLOCK_D": power_of_two(key_dim),
        "BLOCK_DV": power_of_two(value_dim),
    }


def write_warps(num_kv_heads: int, key_dim: int, value_dim: int) -> int:
    """Return how many warps copy a row: 8 numbers for each thread, which are 16 bytes in half precision."""
    numbers = power_of_two(num_kv_heads) * power_of_two(max(key_dim, value_dim))
    return min(max(numbers // 256, 1), 16)
