"""Products with frozen bf16 weights in panels: our own kernels for AVX-512 bf16 and for matrix tiles (AMX).

Shapes: M rows, K inputs, N outputs. The layout and the kernels are described in native/products.h.
"""

import ctypes
import enum
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional

from app.models.cpu.building import NotBuilt
from app.models.cpu.huge_pages import empty_in_huge_pages
from app.models.cpu.library import load_library

_LANES = 16  # outputs of a panel
_KINDS = {1: "AVX-512 bf16", 2: "AMX"}

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_PACK: list[Any] = [_POINTER, _LONG, _LONG, _LONG, _POINTER, _INT]
_MULTIPLY: list[Any] = [
    *(_POINTER, _LONG, _LONG, _POINTER, _POINTER, _LONG, _LONG),
    *(_INT, _INT, _POINTER, _LONG, _INT),
]


class Activation(enum.IntEnum):
    """What a product can be put through while it is written; numbers as in native/activations.h."""

    NONE = 0
    SILU = 1
    RELU = 2
    GELU = 3
    GELU_TANH = 4


@dataclass(frozen=True, slots=True)
class Panels:
    """Weights `[N, K]` in bf16, packed.

    Gated ones are two weights in turns, 16 outputs each: `multiply` returns `activation(gate) * up`.
    """

    numbers: Tensor
    bias: Tensor | None  # [N], in the order of the outputs
    outputs: int
    inputs: int
    is_gated: bool = False

    @classmethod
    def pack(cls, weight: Tensor, bias: Tensor | None = None) -> Self:
        """Pack a weight `[N, K]`."""
        outputs, inputs = weight.shape
        numbers = empty_in_huge_pages(_products().promptplex_panels_size(outputs, inputs), torch.bfloat16)
        _pack(weight, numbers, 1)
        return cls(numbers, bias, outputs, inputs)

    @classmethod
    def pack_gated(cls, weights: tuple[Tensor, Tensor], biases: tuple[Tensor | None, Tensor | None]) -> Self:
        """Pack gate and up, both `[N, K]`, in turns; N is a multiple of 16."""
        outputs, inputs = weights[0].shape
        half = _products().promptplex_panels_size(outputs, inputs)
        numbers = empty_in_huge_pages(2 * half, torch.bfloat16)
        one_panel = half // (outputs // _LANES)
        for place, weight in enumerate(weights):
            _pack(weight, numbers[place * one_panel :], 2)
        bias = concatenated(weights, biases)
        if bias is not None:
            bias = bias.view(2, -1, _LANES).transpose(0, 1).flatten()
        return cls(numbers, bias, 2 * outputs, inputs, is_gated=True)

    @property
    def addresses(self) -> tuple[int, int]:
        """Return where the panels and the bias lie; 0: there is none."""
        return self.numbers.data_ptr(), 0 if self.bias is None else self.bias.data_ptr()

    def plain(self) -> Tensor:
        """Return a plain copy of the weight, `[N, K]`; not of gated ones."""
        assert not self.is_gated
        num_panels = -(-self.outputs // _LANES)
        rows = self.numbers.view(num_panels, -1, _LANES, 2).transpose(1, 2).reshape(num_panels * _LANES, -1)
        return rows[: self.outputs, : self.inputs].contiguous()

    def multiply(self, rows: Tensor, activation: Activation = Activation.NONE) -> Tensor:
        """Return `[M, N]` for `rows [M, K]`, or `[M, N / 2]` of gated ones."""
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        width = self.outputs // 2 if self.is_gated else self.outputs
        out = rows.new_empty(len(rows), width)
        if len(rows):
            _products().promptplex_multiply(
                *(rows.data_ptr(), rows.stride(0), len(rows), *self.addresses, self.outputs, self.inputs),
                *(activation, self.is_gated, out.data_ptr(), width, torch.get_num_threads()),
            )
        return out


def concatenated(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor | None:
    """Return the biases of several weights `[N, K]` in a row, zeros where one has none; None: none has."""
    if all(bias is None for bias in biases):
        return None
    parts = zip(weights, biases, strict=True)
    return torch.cat([weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in parts])


def _pack(weight: Tensor, numbers: Tensor, step: int) -> None:
    weight = weight.detach().contiguous()
    _products().promptplex_pack_weights(
        weight.data_ptr(), *weight.shape, step, numbers.data_ptr(), torch.get_num_threads()
    )


@cache
def _products() -> ctypes.CDLL:
    """Return the library. Raise NotBuilt: it has no products for this processor."""
    return bound(load_library())


def bound(library: ctypes.CDLL) -> ctypes.CDLL:
    """Return a library whose functions know their arguments. Raise NotBuilt: it has no products."""
    if library.promptplex_products_kind() not in _KINDS:
        raise NotBuilt("this processor has neither AVX-512 bf16 nor AMX")
    library.promptplex_panels_size.argtypes = [_LONG, _LONG]
    library.promptplex_panels_size.restype = _LONG
    library.promptplex_pack_weights.argtypes, library.promptplex_pack_weights.restype = _PACK, None
    library.promptplex_multiply.argtypes, library.promptplex_multiply.restype = _MULTIPLY, None
    return library


@cache
def product_kind() -> str | None:
    """Return the instructions that products are made with here; None: there are no products of our own."""
    try:
        kind = _KINDS[_products().promptplex_products_kind()]
    except NotBuilt:
        return None
    return kind if _is_right() else None


def _is_right() -> bool:
    """Compare products of one row, some and many with torch's: a compiler can be wrong."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(72, 70, generator=generator), torch.randn(72, generator=generator)
    weight, bias = weight.to(torch.bfloat16), bias.to(torch.bfloat16)
    panels = Panels.pack(weight, bias)
    for num_rows in (1, 13, 45):
        rows = torch.randn(num_rows, 70, generator=generator).to(torch.bfloat16)
        expected = functional.linear(rows.float(), weight.float(), bias.float())
        if not torch.allclose(panels.multiply(rows).float(), expected, rtol=2e-2, atol=5e-2):
            return False
    return True
