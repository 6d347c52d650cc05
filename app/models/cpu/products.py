"""Products with frozen weights in panels: our own kernels for AVX-512 and for matrix tiles (AMX).

Weights are bf16 numbers, or integers of 8 bits with a scale for each output; then rows become integers too,
with a scale for each row, while a kernel packs them. Rows and products are bf16.

Shapes: M rows, K inputs, N outputs. The layout and the kernels are described in native/products.h.
"""

import ctypes
import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from app.models.cpu.building import NotBuilt
from app.models.cpu.huge_pages import empty_in_huge_pages
from app.models.cpu.library import load_library

_LANES = 16  # outputs of a panel
_LINE = 64  # bytes of a panel's row: so many of an output's numbers are filled up with zeros
_LARGEST = 127  # of quantised numbers
_OFFSET = 128  # that kernels add to a row's integers, which instructions take without a sign
_KINDS = {1: "AVX-512 bf16", 2: "AMX"}

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_PACK: list[Any] = [_POINTER, _LONG, _LONG, _POINTER, _INT]
_MULTIPLY: list[Any] = [
    *(_POINTER, _LONG, _LONG, _POINTER, _POINTER, _POINTER, _LONG, _LONG),
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
    """Weights `[N, K]`, packed.

    Gated ones are two weights in turns, 16 outputs each: `multiply` returns `activation(gate) * up`.
    """

    numbers: Tensor  # [N / 16, K / 2, 16, 2] in bf16, or [N / 16, K / 4, 16, 4] of integers
    bias: Tensor | None  # [N], in the order of the outputs
    outputs: int
    inputs: int
    channels: Tensor | None = None  # of integers: [N / 16, 2, 16], scales as bits of floats, and corrections
    is_gated: bool = False

    @classmethod
    def pack(cls, weight: Tensor, bias: Tensor | None = None) -> Self:
        """Pack a weight `[N, K]` in bf16."""
        weight = weight.detach().contiguous()
        outputs, inputs = weight.shape
        numbers = _room((-(-outputs // _LANES), _words(2 * inputs), _LANES, 2), torch.bfloat16)
        _products().promptplex_pack_weights(
            weight.data_ptr(), outputs, inputs, numbers.data_ptr(), torch.get_num_threads()
        )
        return cls(numbers, bias, outputs, inputs)

    @classmethod
    def quantise(cls, weight: Tensor, bias: Tensor | None = None) -> Self:
        """Round a weight `[N, K]` to integers from -127 to 127, times a scale for each output."""
        outputs, inputs = weight.shape
        num_panels = -(-outputs // _LANES)
        missing = (0, 4 * _words(inputs) - inputs, 0, num_panels * _LANES - outputs)
        rows = functional.pad(weight.detach().float(), missing)
        scales = rows.abs().amax(1) / _LARGEST
        rows.div_(scales.where(scales != 0, torch.ones(())).unsqueeze(1)).round_()
        corrections = (_OFFSET * rows.sum(1, dtype=torch.float64)).int()
        numbers = _room((num_panels, _words(inputs), _LANES, 4), torch.int8)
        numbers.copy_(rows.view(num_panels, _LANES, -1, 4).transpose(1, 2))
        channels = torch.stack([scales.view(torch.int32), corrections]).view(2, -1, _LANES).transpose(0, 1)
        return cls(numbers, bias, outputs, inputs, channels.contiguous())

    @classmethod
    def gated(cls, gate: Self, up: Self) -> Self:
        """Put gate and up, both `[N, K]`, into turns; N is a multiple of 16."""
        bias = concatenated((gate, up))
        if bias is not None:
            bias = bias.view(2, -1, _LANES).transpose(0, 1).flatten()
        channels = None
        if gate.channels is not None and up.channels is not None:
            channels = _in_turns(gate.channels, up.channels)
        numbers = _in_turns(gate.numbers, up.numbers)
        return cls(numbers, bias, 2 * gate.outputs, gate.inputs, channels, is_gated=True)

    @property
    def addresses(self) -> tuple[int, int, int]:
        """Return `Packed` of native/products.h; 0: there is none."""
        optional = (self.channels, self.bias)
        channels, bias = (0 if each is None else each.data_ptr() for each in optional)
        return self.numbers.data_ptr(), channels, bias

    def plain(self) -> Tensor:
        """Return a plain copy of the weight, `[N, K]` in bf16; not of gated ones."""
        assert not self.is_gated
        rows = self.numbers.transpose(1, 2).flatten(2).flatten(0, 1)
        if self.channels is not None:
            scales = self.channels[:, 0].reshape(-1, 1).view(torch.float32)
            rows = (rows * scales).to(torch.bfloat16)
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


def concatenated(parts: Sequence[Panels | nn.Linear]) -> Tensor | None:
    """Return the biases of several weights in a row, zeros where one has none; None: none has."""
    biases = [part.bias for part in parts]
    present = next((bias for bias in biases if bias is not None), None)
    if present is None:
        return None
    sizes = [part.out_features if isinstance(part, nn.Linear) else part.outputs for part in parts]
    each = zip(sizes, biases, strict=True)
    return torch.cat([present.new_zeros(size) if bias is None else bias.detach() for size, bias in each])


def _words(num_bytes: int) -> int:
    """Return how many words of 32 bits an output's numbers take in a panel."""
    return -(-num_bytes // _LINE) * _LINE // 4


def _in_turns(first: Tensor, second: Tensor) -> Tensor:
    both = _room((len(first), 2, *first.shape[1:]), first.dtype)
    return torch.stack([first, second], 1, out=both).flatten(0, 1)


def _room(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return empty_in_huge_pages(math.prod(shape), dtype).view(shape)


@cache
def _products() -> ctypes.CDLL:
    """Return the library. Raise NotBuilt: it has no products for this processor."""
    return bound(load_library())


def bound(library: ctypes.CDLL) -> ctypes.CDLL:
    """Return a library whose functions know their arguments. Raise NotBuilt: it has no products."""
    if library.promptplex_products_kind() not in _KINDS:
        raise NotBuilt("this processor has neither AVX-512 bf16 nor AMX")
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


@cache
def why_no_int8() -> str | None:
    """Return why there are no products of integers here; None: there are."""
    if product_kind() is None:
        return "no products of our own run here (they need a compiler, and AVX-512 bf16 or AMX)"
    if not _products().promptplex_has_int8():
        return "this processor has neither AVX-512 VNNI nor AMX for integers of 8 bits"
    return None if _is_int8_right() else "products of integers differ from torch's: the compiler is wrong"


def _is_int8_right() -> bool:
    """Compare with torch's products of the same integers."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(72, 70, generator=generator).to(torch.bfloat16)
    panels = Panels.quantise(weight)
    for num_rows in (1, 13, 45):
        rows = torch.randn(num_rows, 70, generator=generator).to(torch.bfloat16)
        if not torch.allclose(panels.multiply(rows), _quantised_product(panels, rows), rtol=1e-2):
            return False
    return True


def _quantised_product(panels: Panels, rows: Tensor) -> Tensor:
    """Return by torch what `multiply` makes of `rows [M, K]`: `[M, N]`."""
    most = rows.float().abs().amax(1, keepdim=True)
    inverse = torch.full_like(most, _LARGEST) / most  # not `_LARGEST / most`, which torch rounds twice
    integers = (rows.double() * inverse).round()  # a kernel rounds the exact product once, too
    assert panels.channels is not None
    weights = panels.numbers.transpose(1, 2).flatten(2).flatten(0, 1)[:, : panels.inputs]
    scales = panels.channels[:, 0].flatten().view(torch.float32)
    product = (integers @ weights.double().T).float() * scales * (most / _LARGEST)
    return product[:, : panels.outputs].to(rows.dtype)
