"""How a GPU's memory is divided: the model, the largest step, graphs, and all the rest for keys and values.

Pure arithmetic over measured bytes.
"""

from dataclasses import dataclass

from app.engine.memory.device import DeviceMemory
from app.engine.memory.trial_steps import StepPeaks

# What the driver may still take beside tensors: modules of kernels, libraries on another thread, steps of
# other shapes that leave other holes.
_RESERVE_BYTES, _RESERVE_SHARE = 256 << 20, 0.02
# Beside activations: the nodes of a bucket's graphs (vLLM reports 9 MiB for each of an 8B base's sizes), and
# the workspace that cuBLAS takes in a capture (32 MiB on Hopper) with the inputs that stay where they are.
_GRAPH_BYTES, _CAPTURE_BYTES = 12 << 20, 64 << 20


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Shares of a GPU, in bytes."""

    total: int
    model: int  # weights, and what libraries keep
    activations: int  # of the largest step
    graphs: int
    room: int  # for activations, graphs, keys and values
    kv_cache: int

    @property
    def is_enough(self) -> bool:
        """Whether all of it fits, and anything is left for keys and values."""
        return 0 < self.kv_cache <= self.room - self.activations - self.graphs

    def __str__(self) -> str:
        left = self.total - self.model - self.activations - self.graphs - self.kv_cache
        return (
            f"{gib(self.total)} GiB: model {gib(self.model)}, largest step {gib(self.activations)}, "
            f"CUDA graphs {gib(self.graphs)}, keys and values {gib(self.kv_cache)}, left {gib(left)}"
        )


def plan_memory(
    memory: DeviceMemory,
    peaks: StepPeaks,
    *,
    utilization: float,
    num_graphs: int,
    bytes_per_slot: int,
    kv_cache_bytes: int | None,
) -> MemoryPlan:
    """Divide what `memory` shows beside a loaded model that has run its largest steps.

    The server takes `utilization` of the total, and no more than is free but for a reserve. A step takes
    more for each slot of `bytes_per_slot` that its rows see, and they may see all there are. None for
    `kv_cache_bytes`: as many as fit.

    Raises:
        ValueError: It doesn't fit; says what takes how much, and what can be lowered.
    """
    reserve = max(_RESERVE_BYTES, int(_RESERVE_SHARE * memory.total))
    room = min(int(utilization * memory.total) - memory.reserved, memory.free - reserve)
    graphs = num_graphs * _GRAPH_BYTES + peaks.decode + _CAPTURE_BYTES if num_graphs else 0
    growth = peaks.per_slot / bytes_per_slot  # bytes of a step for each byte of keys and values
    fits = int((room - peaks.largest - graphs) / (1 + growth))
    kv_cache = fits if kv_cache_bytes is None else kv_cache_bytes
    activations = peaks.largest + int(growth * max(0, kv_cache))
    plan = MemoryPlan(memory.total, memory.reserved, activations, graphs, room, kv_cache)
    if not plan.is_enough:
        raise ValueError(
            _what_is_missing(plan, memory, utilization, is_asked=kv_cache_bytes is not None, fits=fits)
        )
    return plan


def no_room_to_measure(memory: DeviceMemory, *, max_rows: int, token_budget: int) -> ValueError:
    """Return the error of a step that failed for want of memory before there was any K/V cache."""
    return ValueError(
        f"the GPU has no memory for the largest step, of {token_budget} tokens and {max_rows} rows: of "
        f"{gib(memory.total)} GiB the model takes {gib(memory.reserved)}, and {gib(memory.free)} are free; "
        f"{_REMEDIES}"
    )


def gib(num_bytes: float) -> str:
    """Return a size in GiB, for people."""
    return f"{num_bytes / (1 << 30):.2f}"


_REMEDIES = (
    "lower --token-budget, --max-rows or --max-context, set --cuda-graphs false, end other programs on this "
    "GPU, or take a smaller base or dtype"
)


def _what_is_missing(
    plan: MemoryPlan, memory: DeviceMemory, utilization: float, *, fits: int, is_asked: bool
) -> str:
    others = max(0, memory.total - memory.free - memory.reserved)
    where = (
        f"of {gib(plan.total)} GiB the model takes {gib(plan.model)}, the largest step "
        f"{gib(plan.activations)}, CUDA graphs {gib(plan.graphs)}, other programs and the driver "
        f"{gib(others)}, and --gpu-memory-utilization is {utilization:g}"
    )
    if is_asked and fits > 0:
        problem = f"--kv-cache-bytes {plan.kv_cache} ({gib(plan.kv_cache)} GiB) doesn't fit on the GPU"
        remedy = f"ask for at most {fits} ({gib(fits)} GiB)"
    else:
        problem = f"the GPU has no memory left for keys and values ({gib(-fits)} GiB are missing)"
        remedy = "raise --gpu-memory-utilization if it is below 1"
    return f"{problem}: {where}; {remedy}, {_REMEDIES}"
