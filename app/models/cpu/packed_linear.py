"""Linear layers of a frozen model whose weights lie in memory as oneDNN wants them.

`F.linear` reorders a weight at every call. A frozen weight can be reordered once, which makes
products of few rows (decoding) up to about twice as fast on CPUs with native bf16. The layer it
replaces stays the reference: each replacement is compared with it before it is used.

oneDNN compiles a product anew for every number of rows, in a millisecond, and it and torch keep the
last 1,024 of them, half a megabyte each. So large numbers of rows are rounded up to few.
"""

from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional

from app.models.cpu.replacement import replace_modules

# Rows that the blocked layout is chosen for; decoding steps have about as many.
_TYPICAL_ROWS = 32
_ROWS_COMPARED = 3
_EXACT_ROWS = 64  # steps that only decode are not rounded: as many rows as run at once by default


class PackedLinear(nn.Module):
    """A drop-in for a frozen `nn.Linear` in bf16 on a CPU."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _TYPICAL_ROWS)
        self.bias = linear.bias
        # Looked up once: finding the overload takes as long as a small product.
        self._multiply = torch.ops.mkldnn._linear_pointwise.default
        self.in_features = linear.in_features

    @property
    def weight(self) -> Tensor:
        """A plain copy `[out, in]`."""
        plain: Tensor = self._weight.to_dense()
        return plain

    def forward(self, inputs: Tensor) -> Tensor:
        """`inputs [..., N, in]` -> `[..., N, out]`."""
        num_rows = inputs.shape[-2]
        count = _rounded(num_rows)
        if count == num_rows:
            exact: Tensor = self._multiply(inputs, self._weight, self.bias, "none", [], "")
            return exact
        padded = functional.pad(inputs, (0, 0, 0, count - num_rows))
        product: Tensor = self._multiply(padded, self._weight, self.bias, "none", [], "")
        return product[..., :num_rows, :]

    def times(self, inputs: Tensor, factor: Tensor) -> Tensor:
        """`inputs [N, in]` -> `[N, out]`, multiplied by `factor [N, out]` while it is written."""
        missing = (0, 0, 0, _rounded(len(inputs)) - len(inputs))
        product: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            functional.pad(inputs, missing), functional.pad(factor, missing), self._weight, self.bias, "mul"
        )
        return product[: len(inputs)]


def _rounded(num_rows: int) -> int:
    """The next number of rows that there are products for: all that decode, then eight for each doubling."""
    if num_rows <= _EXACT_ROWS:
        return num_rows
    step = 1 << ((num_rows - 1).bit_length() - 4)
    return -(-num_rows // step) * step


def pack_linears(model: nn.Module) -> int:
    """Replace every bf16 linear layer that lies on a CPU; how many were.

    Nothing is replaced where this build of torch lacks the operators, or where a replacement's
    products differ from the original's beyond rounding.
    """
    return replace_modules(model, _packed) if _has_operators() else 0


def _packed(module: nn.Module) -> PackedLinear | None:
    if not _is_plain(module) or module.weight.dtype != torch.bfloat16 or not module.weight.is_cpu:
        return None
    packed = PackedLinear(module)
    return packed if _agrees(packed, module) else None


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Not a quantized layer, whose weight is a tensor of another class or whose forward was replaced."""
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter and "forward" not in vars(module)


def _has_operators() -> bool:
    operators = torch.ops.mkldnn
    return (
        hasattr(operators, "_linear_pointwise")
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch leaves it so
        and bool(operators._is_mkldnn_bf16_supported())
    )


@torch.inference_mode()
def _agrees(packed: PackedLinear, linear: nn.Linear) -> bool:
    rows = torch.linspace(-1, 1, _ROWS_COMPARED * linear.in_features).view(_ROWS_COMPARED, -1)
    inputs = rows.to(linear.weight.dtype)
    return torch.allclose(packed(inputs), linear(inputs), rtol=2e-2, atol=1e-2)
