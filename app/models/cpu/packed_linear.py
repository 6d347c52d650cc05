"""Linear layers of a frozen model, with weights in the memory layout of oneDNN.

`F.linear` reorders a weight at every call. A frozen weight can be reordered once, which makes
products of few rows (decoding) up to about twice as fast on CPUs with native bf16.

oneDNN compiles a product anew for every number of rows, in a millisecond, and it and torch keep the
last 1,024 of them, half a megabyte each. So large numbers of rows are rounded up to few.
"""

from copy import copy
from typing import NamedTuple, Self, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional

from app.models.cpu.replacement import replace_modules

# Rows that the blocked layout is chosen for; decoding steps have about as many.
_TYPICAL_ROWS = 32
_EXACT_ROWS = 64  # steps that only decode are not rounded: as many rows as run at once by default
_LONG_BITS = 10  # more than 1,024 rows


class PostOp(NamedTuple):
    """What oneDNN does to a product while it is written, by its names."""

    name: str = "none"
    algorithm: str = ""


class PackedLinear(nn.Module):
    """A drop-in for a frozen `nn.Linear` in bf16 on a CPU."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _TYPICAL_ROWS)
        self.bias = linear.bias
        # Not a parameter, which every call would look up by name.
        self._bias = None if linear.bias is None else linear.bias.detach()
        self._post_op, self._algorithm = PostOp()
        # Looked up once: finding the overload takes as long as a small product.
        self._multiply = torch.ops.mkldnn._linear_pointwise.default
        self.in_features = linear.in_features

    @property
    def weight(self) -> Tensor:
        """Return a plain copy `[out, in]`."""
        plain: Tensor = self._weight.to_dense()
        return plain

    def followed_by(self, post_op: PostOp) -> Self:
        """Return the same layer, over the same weights, with this after its product."""
        twin = copy(self)
        twin._post_op, twin._algorithm = post_op
        return twin

    def forward(self, inputs: Tensor) -> Tensor:
        """Return `[..., N, out]` for `inputs [..., N, in]`."""
        num_rows = inputs.shape[-2]
        missing = _rounded(num_rows) - num_rows if num_rows > _EXACT_ROWS else 0
        if missing:
            inputs = functional.pad(inputs, (0, 0, 0, missing))
        product: Tensor = self._multiply(inputs, self._weight, self._bias, self._post_op, [], self._algorithm)
        return product[..., :num_rows, :] if missing else product

    def times(self, inputs: Tensor, factor: Tensor) -> Tensor:
        """Return `[N, out]` for `inputs [N, in]`, multiplied by `factor [N, out]` while it is written."""
        missing = (0, 0, 0, _rounded(len(inputs)) - len(inputs))
        product: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            functional.pad(inputs, missing), functional.pad(factor, missing), self._weight, self._bias, "mul"
        )
        return product[: len(inputs)]


def _rounded(num_rows: int) -> int:
    """Return the next number of rows that products are made for: any up to 64, then eight a doubling.

    From 1,024 on there are sixteen: a step of sources is long, and has as many rows as it happens to.
    """
    if num_rows <= _EXACT_ROWS:
        return num_rows
    bits = (num_rows - 1).bit_length()
    step = 1 << (bits - (5 if bits > _LONG_BITS else 4))
    return -(-num_rows // step) * step


def pack_linears(model: nn.Module) -> int:
    """Replace every bf16 linear layer that lies on a CPU; return how many were replaced.

    None is where this build of torch lacks the operators.
    """
    return replace_modules(model, _packed, rtol=2e-2, atol=1e-2) if _has_operators() else 0


def _packed(module: nn.Module) -> PackedLinear | None:
    if not _is_plain(module) or module.weight.dtype != torch.bfloat16 or not module.weight.is_cpu:
        return None
    return PackedLinear(module)


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Return False for quantized layers, which have a weight of another class or another forward."""
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter and "forward" not in vars(module)


def _has_operators() -> bool:
    operators = torch.ops.mkldnn
    return (
        hasattr(operators, "_linear_pointwise")
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch leaves it so
        and bool(operators._is_mkldnn_bf16_supported())
    )
