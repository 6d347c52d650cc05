"""The library of our own kernels, and norms as functions on tensors: bf16 on a CPU."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from app.models.cpu.building import NotBuilt, build

_LANES = 16  # numbers in the kernels' vectors; widths are whole ones

_POINTER, _LONG, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_ARGUMENTS = {
    "promptplex_rms_norm": [_POINTER, _POINTER, _POINTER, _LONG, _LONG, _FLOAT, _INT],
}


class Kernels:
    """A loaded library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, arguments in _ARGUMENTS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
        self._rms_norm = library.promptplex_rms_norm

    @staticmethod
    def can_normalise(width: int) -> bool:
        """Return whether `rms_norm` takes rows of this width."""
        return width % _LANES == 0

    def rms_norm(self, inputs: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """Return rows of `inputs [..., d]` over their root mean square, times `weight [d]`."""
        inputs = inputs.contiguous()
        out = torch.empty_like(inputs)
        width = inputs.shape[-1]
        self._rms_norm(
            inputs.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            inputs.numel() // width,
            width,
            epsilon,
            torch.get_num_threads(),
        )
        return out


@cache
def load_library() -> ctypes.CDLL:
    """Return the compiled library. Raise NotBuilt: there is none on this machine."""
    try:
        return ctypes.CDLL(str(build()))
    except OSError as error:
        raise NotBuilt(f"the compiled kernels can't be loaded: {error}") from error


@cache
def load_kernels() -> Kernels:
    """Return the kernels. Raise NotBuilt: there are none on this machine."""
    return Kernels(load_library())


def kernels_for(dtype: torch.dtype, device: torch.device) -> Kernels | None:
    """Return the kernels where they apply and exist, else None."""
    if dtype != torch.bfloat16 or device.type != "cpu":
        return None
    try:
        return load_kernels()
    except NotBuilt:
        return None
