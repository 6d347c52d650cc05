"""How many K/V blocks the engine gives itself."""

import os

import torch

from app.models.attention.kv_cache import KVGroup
from app.models.backbone import Backbone

# Shares of what is free after the model is loaded. A CPU's memory is also everybody else's.
_CPU_SHARE = 0.25
_CUDA_SHARE = 0.85


def free_bytes(device: torch.device) -> int:
    """Memory that is free on the device now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def num_blocks_for(
    backbone: Backbone, block_size: int, kv_cache_bytes: int | None, max_rows: int
) -> tuple[int, ...]:
    """Blocks per KV group, the reserved one included: equal counts, as sequences hold equal counts.

    Never more than `max_rows` sequences of full length and as many prefixes could use.
    """
    groups: tuple[KVGroup, ...] = backbone.kv_groups
    block_bytes = block_size * sum(group.bytes_per_slot(backbone.dtype) for group in groups)
    if kv_cache_bytes is None:
        share = _CUDA_SHARE if backbone.device.type == "cuda" else _CPU_SHARE
        kv_cache_bytes = int(free_bytes(backbone.device) * share)
    useful = 2 * max_rows * -(-backbone.geometry.max_positions // block_size)
    count = min(kv_cache_bytes // block_bytes, useful)
    if count < 1:
        raise ValueError(
            f"{kv_cache_bytes} bytes of K/V memory don't hold one block of {block_size} tokens, which takes "
            f"{block_bytes}; give the server more (PROMPTPLEX_KV_CACHE_BYTES)"
        )
    return (count + 1,) * len(groups)
