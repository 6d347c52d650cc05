"""Fixed memory on the device, in parts that the host fills anew for each step."""

from collections.abc import Sequence
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

_ALIGNMENT = 128  # bytes between which parts begin: more than any kernel's loads need
_NUM_BUFFERS = 3  # two steps may be under way while the next one is filled in


class Part(NamedTuple):
    """An array of fixed shape."""

    shape: tuple[int, ...]
    dtype: DTypeLike = np.int64

    @property
    def num_bytes(self) -> int:
        """Of its numbers."""
        return prod(self.shape) * np.dtype(self.dtype).itemsize


class Staging:
    """Parts of one allocation, which never moves: `parts` on the device, filled by one copy a step.

    The host's side is one of several buffers in turn, pinned for a GPU: the copies of earlier steps may not
    have been made yet. On the device they are made in the order of its stream, after the last step's reads.
    """

    def __init__(self, parts: Sequence[Part], device: torch.device) -> None:
        """Allocate the memory, all zero; `parts` by their place in it, those of varying use last."""
        sizes = [-(-part.num_bytes // _ALIGNMENT) * _ALIGNMENT for part in parts]
        self._begins = [*accumulate(sizes, initial=0)]
        is_gpu = device.type != "cpu"
        self._memory = torch.zeros(self._begins[-1], dtype=torch.uint8, device=device)
        host = [torch.zeros(self._begins[-1], dtype=torch.uint8) for _ in range(_NUM_BUFFERS)]
        self._buffers = [each.pin_memory() for each in host] if is_gpu else host
        self._copied = [_event() if is_gpu else None for _ in range(_NUM_BUFFERS)]
        self.parts = tuple(self._views(self._memory, parts))
        self._host = [tuple(view.numpy() for view in self._views(each, parts)) for each in self._buffers]
        self._turn = 0

    def _views(self, memory: Tensor, parts: Sequence[Part]) -> Sequence[Tensor]:
        return [
            memory[begin : begin + part.num_bytes].view(_torch_dtype(part.dtype)).view(part.shape)
            for begin, part in zip(self._begins, parts, strict=False)
        ]

    @property
    def num_bytes(self) -> int:
        """Of the device's side."""
        return self._begins[-1]

    def fill(self) -> tuple[NDArray[Any], ...]:
        """Return the parts to fill in for the next step; what they hold is of some earlier one."""
        self._turn = (self._turn + 1) % _NUM_BUFFERS
        copied = self._copied[self._turn]
        if copied is not None:
            copied.synchronize()  # done long ago, unless more steps are under way than there are buffers
        return self._host[self._turn]

    def send(self, last: int) -> None:
        """Copy what was filled in, of the last part the first `last` numbers along its first axis."""
        *_, part = self.parts
        row = part.element_size() * prod(part.shape[1:])
        end = self._begins[len(self.parts) - 1] + last * row
        self._memory[:end].copy_(self._buffers[self._turn][:end], non_blocking=True)
        copied = self._copied[self._turn]
        if copied is not None:
            copied.record()


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def _torch_dtype(dtype: DTypeLike) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype
