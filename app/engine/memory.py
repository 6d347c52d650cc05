"""How many K/V blocks the engine gives itself."""

import os
from bisect import bisect_right
from pathlib import Path

import torch

from app.engine.blocks import KVBlocks, TableGroup, table_groups
from app.models.backbone import Backbone

# Shares of what is free after the model is loaded. A CPU's memory is also everybody else's.
_CPU_SHARE = 0.25
_CUDA_SHARE = 0.85
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> float:
    """Memory that the engine could have on the device now; a container's limit counts."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(_available_bytes(), _container_bytes())


def _available_bytes() -> int:
    """What the kernel could give without swapping (the page cache is given back first)."""
    if not _MEMINFO.is_file():  # not Linux: half of all there is, by estimate
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def _container_bytes() -> float:
    """What a container's limit (cgroup v2) leaves; infinite where there is none."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return float("inf")
    return float("inf") if limit == "max" else max(0, int(limit) - used)


def kv_blocks(
    backbone: Backbone, *, block_size: int, kv_cache_bytes: int | None, max_rows: int, token_budget: int
) -> KVBlocks:
    """Return the blocks that `kv_cache_bytes` (None: a share of the free memory) hold, divided as rows need.

    Full groups get more than window groups where rows are longer than windows. Never more than
    `max_rows` sequences of full length and as many prefixes could use.

    Raises:
        ValueError: The memory doesn't hold one block of each group.
    """
    groups = table_groups(backbone.kv_groups, backbone.dtype, block_size=block_size, max_chunk=token_budget)
    if kv_cache_bytes is None:
        share = _CUDA_SHARE if backbone.device.type == "cuda" else _CPU_SHARE
        kv_cache_bytes = int(free_bytes(backbone.device) * share)

    def needs(length: int) -> list[int]:  # of each group, in blocks, where rows are `length` blocks long
        return [_blocks_of_rows(group, max_rows, length) for group in groups]

    def num_bytes(length: int) -> int:
        return sum(need * group.block_bytes for need, group in zip(needs(length), groups, strict=True))

    longest = -(-backbone.geometry.max_positions // block_size)
    length = max(1, bisect_right(range(1, longest + 1), kv_cache_bytes, key=num_bytes))
    shares = [kv_cache_bytes * need // num_bytes(length) for need in needs(length)]
    if min(shares) < 1:
        raise ValueError(
            f"{kv_cache_bytes} bytes of K/V memory don't hold one block of {block_size} tokens, which takes "
            f"{sum(group.block_bytes for group in groups)}; give the server more (PROMPTPLEX_KV_CACHE_BYTES)"
        )
    num_blocks = [1] * len({group.pool for group in groups})
    for group, share, most in zip(groups, shares, needs(longest), strict=True):
        num_blocks[group.pool] += min(share, most)
    return KVBlocks(groups, num_blocks)


def _blocks_of_rows(group: TableGroup, max_rows: int, length: int) -> int:
    """Return a group's blocks for rows of `length` blocks and as many prefixes, one of each in prefill."""
    return 2 * min(max_rows * length, (max_rows - 1) * group.kept_blocks + group.max_blocks)
