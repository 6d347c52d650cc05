"""The kernels as functions on tensors. Shapes as in kernels.cpp; everything is bf16 on a CPU."""

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from app.models.cpu.building import NotBuilt, build

_LANES = 16  # numbers in the kernels' vectors; widths are whole ones
_MAX_GROUP = 56  # query heads of one kv head

_POINTER, _LONG, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_ARGUMENTS = {
    "promptplex_attention": [
        *(_POINTER, _LONG, _LONG, *[_POINTER] * 6, _LONG),
        *(*[_LONG] * 5, _FLOAT, _INT),
    ],
    "promptplex_silu_times": [_POINTER, _POINTER, _POINTER, _LONG, _INT],
    "promptplex_rms_norm": [_POINTER, _POINTER, _POINTER, _LONG, _LONG, _FLOAT, _INT],
}


@dataclass(frozen=True, slots=True)
class PackedContexts:
    """What each item of a packed row attends to: its slots, the last ones its own tokens."""

    slots: Tensor  # [sum of context lengths]
    slot_begin: Tensor  # [items + 1]
    token_begin: Tensor  # [items + 1]


class Kernels:
    """A loaded library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, arguments in _ARGUMENTS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
        self._attention = library.promptplex_attention
        self._silu_times = library.promptplex_silu_times
        self._rms_norm = library.promptplex_rms_norm

    @staticmethod
    def can_attend(queries_per_kv: int, key_dim: int, value_dim: int) -> bool:
        """Return whether `attention` takes these sizes."""
        return key_dim % _LANES == 0 and value_dim % _LANES == 0 and queries_per_kv <= _MAX_GROUP

    @staticmethod
    def can_normalise(width: int) -> bool:
        """Return whether `rms_norm` takes rows of this width."""
        return width % _LANES == 0

    def attention(
        self,
        query: Tensor,  # [H, T, D], D contiguous
        keys: Tensor,  # [S, Hk * D]
        values: Tensor,  # [S, Hk * Dv]
        contexts: PackedContexts,
        *,
        num_kv_heads: int,
        window: int | None,
        scaling: float,
    ) -> Tensor:
        """Return causal attention of each item over its context, `[T, H, Dv]`."""
        heads, tokens, width = query.shape
        assert query.stride(2) == 1
        value_width = values.shape[1] // num_kv_heads
        out = query.new_empty(tokens, heads, value_width)
        self._attention(
            query.data_ptr(),
            query.stride(1),
            query.stride(0),
            keys.data_ptr(),
            values.data_ptr(),
            out.data_ptr(),
            contexts.slots.data_ptr(),
            contexts.slot_begin.data_ptr(),
            contexts.token_begin.data_ptr(),
            len(contexts.slot_begin) - 1,
            heads,
            num_kv_heads,
            width,
            value_width,
            window or 0,
            scaling,
            torch.get_num_threads(),
        )
        return out

    def silu_times_(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return `silu(gate) * up`, in the memory of `gate`; both are contiguous and of one shape."""
        self._silu_times(
            gate.data_ptr(), up.data_ptr(), gate.data_ptr(), gate.numel(), torch.get_num_threads()
        )
        return gate

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
def load_kernels() -> Kernels:
    """Return the kernels, after a comparison with torch's. Raise NotBuilt: there are none on this machine."""
    try:
        kernels = Kernels(ctypes.CDLL(str(build())))
    except OSError as error:
        raise NotBuilt(f"the compiled kernels can't be loaded: {error}") from error
    _check(kernels)
    return kernels


def kernels_in_words() -> str:
    """Return a phrase: whether there are kernels on this machine, or why not."""
    try:
        load_kernels()
    except NotBuilt as reason:
        return f"none of our own ({reason}): torch's are used, which are slower"
    return "our own, compiled for this processor"


def kernels_for(dtype: torch.dtype, device: torch.device) -> Kernels | None:
    """Return the kernels where they apply and exist, else None."""
    if dtype != torch.bfloat16 or device.type != "cpu":
        return None
    try:
        return load_kernels()
    except NotBuilt:
        return None


def _check(kernels: Kernels) -> None:
    """Compare a small attention with torch's: a compiler can be wrong."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, 9, 32, generator=generator).to(torch.bfloat16) for _ in range(3)
    )  # [heads, tokens, width]
    begin = torch.tensor([0, 9])
    pool_keys, pool_values = (part.transpose(0, 1).reshape(9, 64) for part in (key, value))
    contexts = PackedContexts(torch.arange(9), begin, begin)
    ours = kernels.attention(
        query, pool_keys, pool_values, contexts, num_kv_heads=2, window=None, scaling=0.2
    )
    theirs = functional.scaled_dot_product_attention(
        query.float(), key.float(), value.float(), is_causal=True, scale=0.2
    )
    if not torch.allclose(ours.transpose(0, 1).float(), theirs, atol=2e-2):
        raise NotBuilt("the compiled attention differs from torch's")
