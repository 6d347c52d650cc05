"""Attention of packed tokens over slots of a pool, by our own kernel: bf16 on a CPU. Shapes as in native/."""

import ctypes
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from app.models.cpu.building import NotBuilt
from app.models.cpu.library import load_library

_LANES = 16  # numbers in the kernel's vectors; widths are whole ones
_MAX_GROUP = 56  # query heads of one kv head

_POINTER, _LONG, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_ARGUMENTS: list[Any] = [
    *(_POINTER, _LONG, _LONG, *[_POINTER] * 6, _LONG),
    *(*[_LONG] * 5, _INT, _POINTER, _LONG, _FLOAT, _INT),
]


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


class AttentionKernel:
    """Attention of a loaded library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._function = library.promptplex_attention
        self._function.argtypes = _ARGUMENTS
        self._function.restype = None

    @staticmethod
    def takes(queries_per_kv: int, key_dim: int, value_dim: int) -> bool:
        """Return whether the kernel takes these sizes."""
        return key_dim % _LANES == 0 and value_dim % _LANES == 0 and queries_per_kv <= _MAX_GROUP

    def __call__(
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
        self._function(
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


def _table(position_bias: Tensor, heads: int) -> tuple[int, int]:
    """Return the address of a table `[H, 2M + 1]`, and M."""
    assert position_bias.dtype == torch.float32
    assert position_bias.is_contiguous()
    assert position_bias.shape == (heads, position_bias.shape[1] // 2 * 2 + 1)
    return position_bias.data_ptr(), position_bias.shape[1] // 2


@cache
def load_attention() -> AttentionKernel:
    """Return the kernel, after a comparison with torch's. Raise NotBuilt: there is none on this machine."""
    attend = AttentionKernel(load_library())
    _check(attend)
    return attend


def attention_for(dtype: torch.dtype, device: torch.device) -> AttentionKernel | None:
    """Return the kernel where it applies and exists, else None."""
    if dtype != torch.bfloat16 or device.type != "cpu":
        return None
    try:
        return load_attention()
    except NotBuilt:
        return None


# Tokens, and the slots that they see: few rows, a step of rows, and blocks of K and V with rows of all kinds.
_CHECKED = [(1, 9), (4, 40), (70, 300)]


def _check(attend: AttentionKernel) -> None:
    """Compare small attentions of each kind with torch's: a compiler can be wrong."""
    generator = torch.Generator().manual_seed(0)
    for (tokens, length), is_causal, reach in product(_CHECKED, (True, False), (0, 3)):
        query, key, value = (
            torch.randn(heads, rows, 48, generator=generator).to(torch.bfloat16)
            for heads, rows in ((4, tokens), (2, length), (2, length))
        )
        bias = torch.randn(4, 2 * reach + 1, generator=generator) if reach else None
        ours = attend(
            query,
            key.transpose(0, 1).reshape(length, 96),
            value.transpose(0, 1).reshape(length, 96),
            PackedContexts(torch.arange(length), torch.tensor([0, length]), torch.tensor([0, tokens])),
            num_kv_heads=2,
            window=None,
            scaling=0.2,
            is_causal=is_causal,
            position_bias=bias,
        )
        mask = _mask(tokens, length, is_causal, bias)
        theirs = functional.scaled_dot_product_attention(
            query.float()[None], key.float()[None], value.float()[None], mask, scale=0.2, enable_gqa=True
        )
        if not torch.allclose(ours.transpose(0, 1).float(), theirs[0], atol=2e-2):
            raise NotBuilt("the compiled attention differs from torch's")


def _mask(tokens: int, length: int, is_causal: bool, bias: Tensor | None) -> Tensor:
    """Return what is added to scores, `[H or 1, tokens, length]`."""
    distance = torch.arange(length) - torch.arange(length - tokens, length)[:, None]
    mask = torch.zeros(1, tokens, length)
    if bias is not None:
        reach = bias.shape[1] // 2
        mask = bias[:, distance.clamp(-reach, reach) + reach]
    return mask.masked_fill(distance > 0, float("-inf")) if is_causal else mask
