"""How a step's keys and values get to their slots: by torch, or by one kernel on a GPU.

Shapes: n tokens, Hk kv heads, Dk key width, Dv value width, S slots.
"""

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from app.models.weights import in_one_line
from app.prompt import LayerGeometry

_logger = logging.getLogger(__name__)

# Stores `keys [n, Hk, Dk]` and `values [n, Hk, Dv]`, the last two, at `slots [n]` of pools `[S, Hk * Dk]` and
# `[S, Hk * Dv]`.
RowWriter = Callable[[tuple[Tensor, Tensor], Tensor, Tensor, Tensor], None]

_NUM_CHECKED = 37


def copy_rows(pools: tuple[Tensor, Tensor], slots: Tensor, keys: Tensor, values: Tensor) -> None:
    """Store rows by torch, on every device."""
    for pool, rows in zip(pools, (keys, values), strict=True):
        pool.index_copy_(0, slots, rows.reshape(slots.shape[0], -1))


@cache
def row_writer(geometry: LayerGeometry, dtype: torch.dtype, device: torch.device) -> RowWriter:
    """Return what stores rows of this geometry: the kernel where it does what torch does."""
    if device.type != "cuda":
        return copy_rows
    try:
        from app.models.cuda.kv_write import write_rows  # here: only a server with a GPU imports Triton

        if stores_as_torch(write_rows, geometry, dtype, device):
            return write_rows
        reason = "the kernel differs from torch"
    except Exception as error:  # of a compiler or a driver: whatever it is, torch serves
        reason = in_one_line(error)
    _logger.warning("keys and values are written by torch, which is slower: %s", reason)
    return copy_rows


def stores_as_torch(
    write: RowWriter, geometry: LayerGeometry, dtype: torch.dtype, device: torch.device
) -> bool:
    """Compare a writer with torch's, bit by bit, for rows as attention gets them."""
    heads, widths = geometry.num_kv_heads, (geometry.key_dim, geometry.value_dim)
    slots = torch.randperm(3 * _NUM_CHECKED, generator=torch.Generator().manual_seed(0))[:_NUM_CHECKED]
    keys, values = (torch.randn(heads, _NUM_CHECKED, width).transpose(0, 1) for width in widths)
    given = slots.to(device), keys.to(device, dtype), values.to(device, dtype)
    stored = []
    for writer in (copy_rows, write):
        pools = [torch.zeros(3 * _NUM_CHECKED, heads * width, dtype=dtype, device=device) for width in widths]
        writer((pools[0], pools[1]), *given)
        stored.append(pools)
    return all(torch.equal(theirs, ours) for theirs, ours in zip(*stored, strict=True))
