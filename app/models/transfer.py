"""Arrays on their way to the device, without waiting for it."""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(values: NDArray[Any], device: torch.device) -> Tensor:
    """Return `values` as a tensor on the device; on a CPU it shares their memory.

    A GPU copies from pinned memory, in the order of its stream, while the caller goes on.
    """
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
