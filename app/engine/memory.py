"""How many K/V blocks the engine gives itself."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from app.engine.blocks import Counts, KVBlocks, TableGroup, block_bytes, table_groups
from app.host_memory import host_memory
from app.models.backbone import Backbone
from app.sites import Site

# Shares of what is free after the model is loaded. Other processes use a CPU's memory too.
_CPU_SHARE = 0.25
_CUDA_SHARE = 0.85
_SITES = (Site.DECODER_SELF, Site.DECODER_CROSS, Site.ENCODER_SELF)
_ENCODER_PREFIX_SLOTS = 256  # more than most prefixes have, of which as many as rows fit at a time


def free_bytes(device: torch.device) -> int:
    """Memory that the engine could have on the device now; a container's limit counts."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return host_memory()[1]


def kv_blocks(
    backbone: Backbone, *, block_size: int, kv_cache_bytes: int | None, max_rows: int, token_budget: int
) -> KVBlocks:
    """Return the blocks that `kv_cache_bytes` (None: a share of the free memory) hold, divided as rows need.

    They are divided for the longest rows, sources and prefixes of which `max_rows` each fit at a time, so
    full groups get more than window groups where rows are longer than windows.

    Raises:
        ValueError: The memory doesn't hold one block of each group.
    """
    groups = table_groups(backbone.kv_groups, backbone.dtype, block_size=block_size, max_chunk=token_budget)
    if kv_cache_bytes is None:
        share = _CUDA_SHARE if backbone.device.type == "cuda" else _CPU_SHARE
        kv_cache_bytes = int(free_bytes(backbone.device) * share)

    sizes = block_bytes(groups)
    geometry = backbone.geometry
    slots = (geometry.max_positions, geometry.max_source_positions, _ENCODER_PREFIX_SLOTS)
    limits = {site: -(-limit // block_size) for site, limit in zip(_SITES, slots, strict=True)}
    longest = max(limits[group.site] for group in groups)

    def needs(length: int) -> Counts:
        return _blocks_of_rows(groups, max_rows, {site: min(length, limits[site]) for site in limits})

    def num_bytes(length: int) -> int:
        return int(needs(length) @ sizes)

    length = bisect_right(range(1, longest + 1), kv_cache_bytes, key=num_bytes)
    counts, more = needs(length), needs(length + 1) - needs(length)
    counts += (kv_cache_bytes - num_bytes(length)) * more // max(1, int(more @ sizes))
    if (counts < [sum(group.pool == pool for group in groups) for pool in range(len(sizes))]).any():
        raise ValueError(
            f"{kv_cache_bytes} bytes of K/V memory don't hold one block of {block_size} tokens, which takes "
            f"{sum(group.block_bytes for group in groups)}; give the server more (PROMPTPLEX_KV_CACHE_BYTES)"
        )
    return KVBlocks(groups, (1 + counts).tolist())


def _blocks_of_rows(groups: Sequence[TableGroup], max_rows: int, lengths: Mapping[Site, int]) -> Counts:
    """Return each pool's blocks for rows of `lengths` blocks and as many prefixes, one of each in prefill.

    In the encoder's self-attention only prefixes need blocks; one may be as long as a source.
    """
    counts = np.zeros(len(block_bytes(groups)), np.int64)
    for group in groups:
        rows = min(max_rows * lengths[group.site], (max_rows - 1) * group.kept_blocks + group.max_blocks)
        is_encoder = group.site is Site.ENCODER_SELF
        counts[group.pool] += max(rows, lengths[Site.DECODER_CROSS]) if is_encoder else 2 * rows
    return counts
