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
    heads = tl.arange(0, BLOCK_HEADS)[:, None]
    if tl.program_id(1) == 0:
        columns = tl.arange(0, BLOCK_D)[None, :]
        is_number = (heads < NUM_KV_HEADS) & (columns < KEY_DIM)
        source = keys + token * key_token_stride + heads * key_head_stride + columns
        target = key_pool + slot * (NUM_KV_HEADS * KEY_DIM) + heads * KEY_DIM + columns
        tl.store(target, tl.load(source, mask=is_number), mask=is_number)
    else:
        columns = tl.arange(0, BLOCK_DV)[None, :]
        is_number = (heads < NUM_KV_HEADS) & (columns < VALUE_DIM)
        source = values + token * value_token_stride + heads * value_head_stride + columns
        target = value_pool + slot * (NUM_KV_HEADS * VALUE_DIM) + heads * VALUE_DIM + columns
        tl.store(target, tl.load(source, mask=is_number), mask=is_number)


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
            NUM_KV_HEADS=num_kv_heads,
            KEY_DIM=key_dim,
            VALUE_DIM=values.shape[2],
            BLOCK_HEADS=power_of_two(num_kv_heads),
            BLOCK_D=power_of_two(key_dim),
            BLOCK_DV=power_of_two(values.shape[2]),
        )
