"""Products with frozen bf16 weights in the memory layout of oneDNN, which comes with torch.

`F.linear` reorders a weight at every call. A frozen weight can be reordered once, which makes
products of few rows (decoding) up to about twice as fast on CPUs with native bf16.

oneDNN compiles a product anew for every number of rows, in a millisecond, and it and torch keep the
last 1,024 of them, half a megabyte each. So large numbers of rows are rounded up to few.
"""

import torch
from torch import Tensor
from torch.nn import functional

from app.models.cpu.products import Activation

# Rows that the blocked layout is chosen for; decoding steps have about as many.
_TYPICAL_ROWS = 32
_EXACT_ROWS = 64  # steps that only decode are not rounded: as many rows as run at once by default
_LONG_BITS = 10  # more than 1,024 rows

_POST_OPS = {  # name and algorithm
    Activation.NONE: ("none", ""),
    Activation.SILU: ("swish", ""),
    Activation.RELU: ("relu", ""),
    Activation.GELU: ("gelu", "none"),
    Activation.GELU_TANH: ("gelu", "tanh"),
}


class OneDnnWeight:
    """A weight `[N, K]` in bf16, reordered."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _TYPICAL_ROWS)
        self._bias = bias
        # Looked up once: finding the overload takes as long as a small product.
        self._multiply = torch.ops.mkldnn._linear_pointwise.default

    def plain(self) -> Tensor:
        """Return a plain copy, `[N, K]`."""
        copied: Tensor = self._weight.to_dense()
        return copied

    def multiply(self, rows: Tensor, activation: Activation = Activation.NONE) -> Tensor:
        """Return `[M, N]` for `rows [M, K]`."""
        count = len(rows)
        missing = _rounded(count) - count
        if missing:
            rows = functional.pad(rows, (0, 0, 0, missing))
        name, algorithm = _POST_OPS[activation]
        product: Tensor = self._multiply(rows, self._weight, self._bias, name, [], algorithm)
        return product[:count] if missing else product


def _rounded(num_rows: int) -> int:
    """Return the next number of rows that products are made for: any up to 64, then eight a doubling.

    From 1,024 on there are sixteen: a step of sources is long, and has as many rows as it happens to.
    """
    if num_rows <= _EXACT_ROWS:
        return num_rows
    bits = (num_rows - 1).bit_length()
    step = 1 << (bits - (5 if bits > _LONG_BITS else 4))
    return -(-num_rows // step) * step


def has_onednn() -> bool:
    """Return whether this build of torch has the operators, for a processor with bf16."""
    operators = torch.ops.mkldnn
    return (
        hasattr(operators, "_linear_pointwise")
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch leaves it so
        and bool(operators._is_mkldnn_bf16_supported())
    )
