"""Two figures that bound every forward pass: how fast memory is read, how fast matrices are multiplied."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch takes seconds to import, and commands must start at once
    import torch

_BANDWIDTH_BYTES = 256 << 20  # far larger than any cache
_MATMUL_SIZE = 2048
_MIN_SECONDS = 0.3  # how long a figure is measured at least


def read_bandwidth(device: str) -> float:
    """Bytes per second of one long read."""
    import torch

    source = torch.ones(_BANDWIDTH_BYTES // 4, device=device)
    return _BANDWIDTH_BYTES / _best_seconds(source.sum, device)


def matmul_throughput(device: str, dtype: "torch.dtype") -> float:
    """Floating-point operations per second of square products in `dtype`."""
    import torch

    square = torch.ones(_MATMUL_SIZE, _MATMUL_SIZE, device=device, dtype=dtype)
    return 2 * _MATMUL_SIZE**3 / _best_seconds(lambda: square @ square, device)


def _best_seconds(work: Callable[[], Any], device: str) -> float:
    """The best of several runs: what the machine can do when nothing disturbs it."""
    import torch

    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < _MIN_SECONDS:
        begin = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return best
