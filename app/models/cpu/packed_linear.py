"""Linear layers of a frozen bf16 model, with weights packed once for the kernel that is fastest on them.

That is our own or oneDNN's, by the shape of the weight: a short measurement at the start decides.
"""

import math
import time
from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Literal, Self, TypeGuard

import torch
from torch import Tensor, nn

from app.models.cpu.onednn import OneDnnWeight, has_onednn
from app.models.cpu.products import Activation, Panels, product_kind
from app.models.cpu.replacement import replace_modules

_ROWS_MEASURED = (1, 8, 32, 256)  # a lone stream, decoding, prefill: each counts as much
_RUNS = 8  # of each, in turns; the fastest counts
_OUTPUTS_MEASURED = 4096  # of larger weights (heads) a part is measured
_MARGIN = math.log(1.1)  # by which the other's must be faster: only ours can be parts of larger kernels

_INT8_TOLERANCE = 5e-2  # of the largest output: what rounding to 8 bits leaves

Weight = Panels | OneDnnWeight
Weights = Literal["auto", "int8"]  # as loaded, or the stacks' linear layers in integers


class PackedLinear(nn.Module):
    """A drop-in for a frozen `nn.Linear` in bf16 on a CPU."""

    def __init__(self, packed: Weight, bias: Tensor | None, in_features: int) -> None:
        super().__init__()
        self.packed = packed
        self.bias = bias
        self.in_features = in_features
        self._activation = Activation.NONE

    @property
    def weight(self) -> Tensor:
        """Return a plain copy `[out, in]`."""
        return self.packed.plain()

    def followed_by(self, activation: Activation) -> Self:
        """Return the same layer, over the same weights, with this after its product."""
        twin = copy(self)
        twin._activation = activation
        return twin

    def forward(self, inputs: Tensor) -> Tensor:
        """Return `[..., out]` for `inputs [..., in]`."""
        rows = inputs.flatten(0, -2) if inputs.ndim != 2 else inputs
        product = self.packed.multiply(rows, self._activation)
        return product if inputs.ndim == 2 else product.view(*inputs.shape[:-1], -1)


def pack_linears(model: nn.Module, weights: Weights = "auto") -> int:
    """Replace every bf16 linear layer that lies on a CPU; return how many were replaced.

    None is where there is neither a kernel of our own nor oneDNN's.
    """
    if not any(map(is_plain, model.modules())):
        return 0  # and nothing is compiled
    quantised = _pack_quantised(model) if weights == "int8" else 0
    choose = fastest_packer()
    if choose is None:
        return quantised
    return quantised + replace_modules(model, lambda each: _packed(each, choose), rtol=2e-2, atol=1e-2)


def _pack_quantised(model: nn.Module) -> int:
    """Replace the linear layers of the model's stacks: not its head, nor what stands beside its layers."""
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    inner = {id(module) for layers in lists for module in layers.modules()}

    def quantised(module: nn.Module) -> PackedLinear | None:
        return _packed(module, lambda _: Panels.quantise) if id(module) in inner else None

    return replace_modules(model, quantised, rtol=_INT8_TOLERANCE, atol=_INT8_TOLERANCE)


def _packed(module: nn.Module, choose: Callable[[Tensor], "Packer"]) -> PackedLinear | None:
    if not is_plain(module):
        return None
    weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
    return PackedLinear(choose(weight)(weight, bias), module.bias, module.in_features)


def is_plain(module: nn.Module | None) -> TypeGuard[nn.Linear]:
    """Return whether it is a linear layer in bf16 on a CPU.

    Quantized layers aren't, which have a weight of another class or another forward.
    """
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and "forward" not in vars(module)
        and module.weight.dtype == torch.bfloat16
        and module.weight.is_cpu
    )


Packer = Callable[[Tensor, Tensor | None], Weight]


def packers() -> tuple[Packer | None, Packer | None]:
    """Return our own way to pack a weight, and oneDNN's, where this machine has them."""
    return Panels.pack if product_kind() else None, OneDnnWeight if has_onednn() else None


class FastestPacker:
    """Which way of packing makes the fastest products, for each shape; measured at its first weight."""

    def __init__(self, ours: Packer | None, other: Packer | None) -> None:
        """At least one of the two is there."""
        self._ours, self._other = ours, other
        self._leads: dict[tuple[int, ...], float] = {}

    def __call__(self, weight: Tensor) -> Packer:
        """Return the packer for weights like `weight [N, K]`: ours, unless the other is faster."""
        ours, other = self._ours, self._other
        packer = ours if other is None or (ours is not None and self.lead(weight) > -_MARGIN) else other
        assert packer is not None
        return packer

    def lead(self, weight: Tensor) -> float:
        """Return the logarithm of how many times as fast our products with such a weight are."""
        if self._ours is None or self._other is None:
            return -math.inf if self._ours is None else math.inf
        shape = tuple(weight.shape)
        if shape not in self._leads:
            part = weight[:_OUTPUTS_MEASURED]
            self._leads[shape] = _lead(self._ours(part, None), self._other(part, None), part)
        return self._leads[shape]


def _lead(ours: Weight, other: Weight, weight: Tensor) -> float:
    leads = []
    for num_rows in _ROWS_MEASURED:
        rows = weight.new_ones(num_rows, weight.shape[1])
        seconds = _fastest([partial(each.multiply, rows) for each in (ours, other)])
        leads.append(math.log(seconds[1] / seconds[0]))
    return sum(leads) / len(leads)


def fastest_packer() -> FastestPacker | None:
    """Return the choice between our products and oneDNN's on this machine; None: there are neither."""
    return FastestPacker(*packers()) if any(packers()) else None


def _fastest(runs: list[Callable[[], object]]) -> list[float]:
    """Return the seconds that each takes at best, in turns."""
    best = [math.inf] * len(runs)
    for _ in range(_RUNS):
        for place, run in enumerate(runs):
            began = time.perf_counter()
            run()
            best[place] = min(best[place], time.perf_counter() - began)
    return best
