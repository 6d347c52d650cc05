"""The memory of the engine's device: what there is, and what work takes of it at most.

Nothing else asks a GPU's driver or torch's allocator for sizes.
"""

import gc
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from app.host_memory import host_memory


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Memory of a device, in bytes."""

    total: int
    free: int  # for any process; what torch keeps for later isn't
    allocated: int  # by this process: on a GPU by tensors, on a CPU by all there is
    reserved: int  # the same, and what torch's allocator keeps for later tensors

    @property
    def unused(self) -> int:
        """Bytes that are reserved and not allocated: between tensors, or kept for those of another step."""
        return self.reserved - self.allocated


def device_memory(device: torch.device) -> DeviceMemory:
    """Read it now; it costs a call to the driver, so not in every step. A container's limit counts."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        return DeviceMemory(total, free, allocated, reserved)
    total, free = host_memory()
    own = _resident_bytes()
    return DeviceMemory(total, free, own, own)


class Meter(Protocol):
    """Measures what work takes of a device."""

    def peak(self, work: Callable[[], object]) -> int:
        """Do the work; return the bytes that were taken at most, beside those that were before."""
        ...

    def memory(self) -> DeviceMemory:
        """Return the device's memory after everything that nothing refers to was given back."""
        ...


class CudaMeter:
    """Measures by torch's own counts: with what its allocator rounds up, and leaves between tensors."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def peak(self, work: Callable[[], object]) -> int:
        before = self.memory()
        torch.cuda.reset_peak_memory_stats(self._device)
        work()
        torch.cuda.synchronize(self._device)
        return max(
            torch.cuda.max_memory_reserved(self._device) - before.reserved,
            torch.cuda.max_memory_allocated(self._device) - before.allocated,
        )

    def memory(self) -> DeviceMemory:
        gc.collect()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        return device_memory(self._device)


def _resident_bytes() -> int:
    """Return the memory of this process that isn't swapped out."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # not Linux: the most there was
