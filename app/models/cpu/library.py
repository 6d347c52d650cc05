"""The kernels as functions on tensors. Shapes as in native/; everything is bf16 on a CPU."""

import ctypes
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
        *(*[_LONG] * 5, _INT, _POINTER, _LONG, _FLOAT, _INT),
    ],
    "promptplex_silu_times": [_POINTER, _POINTER, _POINTER, _LONG, _INT],
    "promptplex_rms_norm": [_POINTER, _POINTER, _POINTER, _LONG, _LONG, _FLOAT, _INT],
}


class PackedContexts:
    """What each item of a packed row attends to: its slots, the last ones its own tokens.

    Without causality and a position bias the tokens needn't have slots of their own, as in cross-attention.
    """

    def __init__(self, slots: Tensor, slot_begin: Tensor, token_begin: Tensor) -> None:
        """`slots [sum of context lengths]`, `slot_begin [items + 1]`, `token_begin [items + 1]`."""
        self.slots, self.slot_begin, self.token_begin = slots, slot_begin, token_begin
        # Once for all layers, as the kernel takes them.
        self.arguments = (
            *(part.data_ptr() for part in (slots, slot_begin, token_begin)),
            len(slot_begin) - 1,
        )


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
        is_causal: bool = True,
        position_bias: Tensor | None = None,  # [H, 2M + 1] in float32
    ) -> Tensor:
        """Return attention of each item over its context, `[T, H, Dv]`.

        Not causal: every token sees every slot, and `window` must be None. A position bias is added to the
        scores by the distance of a key's slot to its query's, from -M to M; larger distances count as these.
        """
        heads, tokens, width = query.shape
        assert query.stride(2) == 1
        assert keys.is_contiguous()
        assert values.is_contiguous()
        assert is_causal or window is None
        bias, reach = (None, 0) if position_bias is None else _table(position_bias, heads)
        value_width = values.shape[1] // num_kv_heads
        out = query.new_empty(tokens, heads, value_width)
        self._attention(
            query.data_ptr(),
            query.stride(1),
            query.stride(0),
            keys.data_ptr(),
            values.data_ptr(),
            out.data_ptr(),
            *contexts.arguments,
            heads,
            num_kv_heads,
            width,
            value_width,
            window or 0,
            is_causal,
            bias,
            reach,
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


def _table(position_bias: Tensor, heads: int) -> tuple[int, int]:
    """Return the address of a table `[H, 2M + 1]`, and M."""
    assert position_bias.dtype == torch.float32
    assert position_bias.is_contiguous()
    assert position_bias.shape == (heads, position_bias.shape[1] // 2 * 2 + 1)
    return position_bias.data_ptr(), position_bias.shape[1] // 2


@cache
def load_library() -> ctypes.CDLL:
    """Return the compiled library. Raise NotBuilt: there is none on this machine."""
    try:
        return ctypes.CDLL(str(build()))
    except OSError as error:
        raise NotBuilt(f"the compiled kernels can't be loaded: {error}") from error


@cache
def load_kernels() -> Kernels:
    """Return the kernels, after a comparison with torch's. Raise NotBuilt: there are none on this machine."""
    kernels = Kernels(load_library())
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
    """Compare small attentions of each kind with torch's: a compiler can be wrong."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, 9, 32, generator=generator).to(torch.bfloat16) for _ in range(3)
    )  # [heads, tokens, width]
    table = torch.randn(2, 7, generator=generator)
    begin = torch.tensor([0, 9])
    pool_keys, pool_values = (part.transpose(0, 1).reshape(9, 64) for part in (key, value))
    contexts = PackedContexts(torch.arange(9), begin, begin)
    distance = (torch.arange(9) - torch.arange(9)[:, None]).clamp(-3, 3)  # [queries, keys]
    for is_causal, bias in ((True, None), (True, table), (False, None), (False, table)):
        ours = kernels.attention(
            query,
            pool_keys,
            pool_values,
            contexts,
            num_kv_heads=2,
            window=None,
            scaling=0.2,
            is_causal=is_causal,
            position_bias=bias,
        )
        mask = torch.zeros(2, 9, 9) if bias is None else bias[:, distance + 3]
        if is_causal:
            mask = mask.masked_fill(distance > 0, float("-inf"))
        theirs = functional.scaled_dot_product_attention(
            query.float(), key.float(), value.float(), attn_mask=mask, scale=0.2
        )
        if not torch.allclose(ours.transpose(0, 1).float(), theirs, atol=2e-2):
            raise NotBuilt("the compiled attention differs from torch's")
