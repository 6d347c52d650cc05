"""Arrays and tensors on their way to the device and back, without waiting for it."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(values: NDArray[Any], device: torch.device) -> Tensor:
    """Return `values` as a tensor on the device; on a CPU it shares their memory.

    A GPU copies from pinned memory, in the order of its stream, while the caller goes on.
    """
    return tensor_to_device(torch.from_numpy(values), device)


def tensor_to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host as one on the device; a CPU's stays as it is."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def packed_to_device(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """Return vectors of one type as tensors on the device, all of them by one copy."""
    if not arrays:
        return []
    lengths = [len(array) for array in arrays]
    return list(torch.split(to_device(np.concatenate(arrays), device), lengths))


def from_device(tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """Begin to copy tensors to the host; the returned function waits for them, in any thread.

    A GPU copies to pinned memory, in the order of its stream. A CPU's are returned as they are.
    """
    copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]  # pinned, as it doesn't block
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return lambda: copies
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record()

    def wait() -> list[Tensor]:
        done.synchronize()
        return copies

    return wait
