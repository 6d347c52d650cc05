"""How many K/V blocks the engine gives itself."""

import logging
from bisect import bisect_right
from collections.abc import Mapping, Sequence

import numpy as np

from app.engine.blocks import Counts, KVBlocks, TableGroup, block_bytes, table_groups
from app.engine.graphs.recording import why_unrecordable
from app.engine.memory.device import CudaMeter, DeviceMemory, Meter
from app.engine.memory.division import MemoryPlan, gib, no_room_to_measure, plan_memory
from app.engine.memory.exhaustion import forget_step, is_out_of_memory
from app.engine.memory.trial_steps import StepPeaks, Trials, measure_steps, trial_cache
from app.engine.runner import Runner
from app.engine.scheduler import SchedulerConfig
from app.host_memory import host_memory
from app.models.backbone import Backbone
from app.sites import Site

# Of a CPU's memory that is free after the model is loaded; other processes use it too.
_CPU_SHARE = 0.25
_SITES = (Site.DECODER_SELF, Site.DECODER_CROSS, Site.ENCODER_SELF)
_ENCODER_PREFIX_SLOTS = 256  # more than most prefixes have, of which as many as rows fit at a time


_log = logging.getLogger("promptplex.engine")


def kv_cache_bytes(
    backbone: Backbone, bounds: SchedulerConfig, *, utilization: float, num_graphs: int, asked: int | None
) -> int:
    """Return the bytes for keys and values: those `asked` for, or on a GPU all that steps leave.

    A GPU runs the largest steps of `bounds` for it, and `num_graphs` of decode steps are recorded there. The
    server takes `utilization` of a GPU's memory.

    Raises:
        ValueError: There isn't as much memory; says what takes it, and what can be lowered.
    """
    if backbone.device.type == "cuda":
        return planned(
            backbone,
            bounds,
            CudaMeter(backbone.device),
            utilization=utilization,
            num_graphs=num_graphs,
            asked=asked,
        ).kv_cache
    total, free = host_memory()
    if asked is not None and asked > total:
        raise ValueError(
            f"--kv-cache-bytes {asked} ({gib(asked)} GiB) is more than the {gib(total)} GiB of memory that "
            "this machine or container has; ask for less"
        )
    return int(free * _CPU_SHARE) if asked is None else asked


def planned(
    backbone: Backbone,
    bounds: SchedulerConfig,
    meter: Meter,
    *,
    utilization: float,
    num_graphs: int,
    asked: int | None,
) -> MemoryPlan:
    """Divide the memory that `meter` measures, and log how. Raises as `kv_cache_bytes`."""
    bytes_per_slot = sum(group.bytes_per_slot(backbone.dtype) for group in backbone.kv_groups)
    memory = meter.memory()
    trials = Trials(backbone.geometry, backbone.kv_groups, bounds, memory.free // bytes_per_slot)
    try:
        peaks = _measured(backbone, meter, trials)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        forget_step(error)
        raise no_room_to_measure(
            meter.memory(), max_rows=bounds.max_rows, token_budget=bounds.token_budget
        ) from error
    plan = plan_memory(
        meter.memory(),
        peaks,
        utilization=utilization,
        num_graphs=num_graphs if why_unrecordable(backbone) is None else 0,
        bytes_per_slot=bytes_per_slot,
        kv_cache_bytes=asked,
    )
    _log.info("memory of %s: %s", backbone.device, plan)
    return plan


def in_words(blocks: KVBlocks, memory: DeviceMemory) -> str:
    """Return how large the K/V cache is, and what is left beside it."""
    counts = ", ".join(map(str, blocks.capacity.tolist()))
    return (
        f"{gib(blocks.num_bytes)} GiB in {counts} blocks of {blocks.block_size} tokens; the device has "
        f"{gib(memory.total)} GiB, of which {gib(memory.allocated)} are in use here, {gib(memory.unused)} "
        f"kept for later steps, and {gib(memory.free)} free"
    )


def _measured(backbone: Backbone, meter: Meter, trials: Trials) -> StepPeaks:
    """Run the largest steps over a small cache, of which nothing stays."""
    runner = Runner(backbone, trial_cache(backbone))
    return measure_steps(lambda plan: runner.run(plan, dict).result(), meter, trials)


def kv_blocks(
    backbone: Backbone, *, block_size: int, kv_cache_bytes: int, max_rows: int, token_budget: int
) -> KVBlocks:
    """Return the blocks that `kv_cache_bytes` hold, divided as rows need.

    They are divided for the longest rows, sources and prefixes of which `max_rows` each fit at a time, so
    full groups get more than window groups where rows are longer than windows.

    Raises:
        ValueError: The memory doesn't hold one block of each group.
    """
    groups = table_groups(backbone.kv_groups, backbone.dtype, block_size=block_size, max_chunk=token_budget)
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
