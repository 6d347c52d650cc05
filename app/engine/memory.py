"""How many K/V blocks the engine gives itself."""

import os
from pathlib import Path

import torch

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


def num_blocks_for(
    backbone: Backbone, block_size: int, kv_cache_bytes: int | None, max_rows: int
) -> tuple[int, ...]:
    """Blocks per KV group, the reserved one included: equal counts, as sequences hold equal counts.

    Never more than `max_rows` sequences of full length and as many prefixes could use.
    """
    groups = backbone.kv_groups
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
