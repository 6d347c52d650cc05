"""MLPs of a frozen model on a CPU: fewer passes over wide activations.

`down(act(gate(x)) * up(x))` as transformers writes it makes four tensors of the intermediate width
and reads them again. Here the activation, and with our own kernels the product with up too, are part of the
product that goes before. Long inputs go through in blocks of rows, so that their activations stay in the
cache.
"""

from typing import TypeGuard

import torch
from torch import Tensor, nn

from app.models.cpu.packed_linear import PackedLinear, Weight
from app.models.cpu.products import Activation, Panels
from app.models.cpu.replacement import replace_modules

_BLOCK_ROWS = 512  # enough for full speed of the products, few enough for the last cache level
_GATED_NAMES = (("gate_proj", "up_proj", "down_proj", "act_fn"), ("wi_0", "wi_1", "wo", "act"))
_PLAIN_NAMES = ("wi", "wo", "act")
_WHOLE_PANEL = 16  # outputs; gate and up are merged where they have whole ones
_ACTIVATIONS = {  # by the names of their classes
    "SiLU": Activation.SILU,
    "SiLUActivation": Activation.SILU,
    "ReLU": Activation.RELU,
    "GELUActivation": Activation.GELU,
    "GELUTanh": Activation.GELU_TANH,
    "NewGELUActivation": Activation.GELU_TANH,
}


def activation_of(function: object) -> Activation | None:
    """Return which activation a module computes, by its class; None: none that a product has."""
    return _ACTIVATIONS.get(type(function).__name__)


class _InBlocks(nn.Module):
    """A module that computes its rows independently."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_features = width

    def forward(self, inputs: Tensor) -> Tensor:
        """Return `[..., d]` for `inputs [..., d]`."""
        rows = inputs.flatten(0, -2)
        if len(rows) <= _BLOCK_ROWS:
            return self._block(rows).view(inputs.shape)
        outputs = torch.empty_like(rows)
        for begin in range(0, len(rows), _BLOCK_ROWS):
            outputs[begin : begin + _BLOCK_ROWS] = self._block(rows[begin : begin + _BLOCK_ROWS])
        return outputs.view(inputs.shape)

    def _block(self, rows: Tensor) -> Tensor:
        """Return `[n, d]` for `rows [n, d]`."""
        raise NotImplementedError


class GatedMLP(_InBlocks):
    """A drop-in for an MLP with two products up, of which one goes through the activation."""

    def __init__(
        self, gate: PackedLinear, up: PackedLinear, down: PackedLinear, activation: Activation
    ) -> None:
        super().__init__(gate.in_features)
        self.gate, self.up, self.down = gate.followed_by(activation), up, down

    def _block(self, rows: Tensor) -> Tensor:
        # A frozen model's products are called as functions: there are no hooks to look for.
        return self.down.forward(self.gate.forward(rows).mul_(self.up.forward(rows)))


class MergedMLP(_InBlocks):
    """The same with gate and up as one product."""

    def __init__(self, gate_up: Panels, down: PackedLinear, activation: Activation) -> None:
        super().__init__(gate_up.inputs)
        self.gate_up, self.down = gate_up, down
        self._activation = activation

    def _block(self, rows: Tensor) -> Tensor:
        return self.down.forward(self.gate_up.multiply(rows, self._activation))


class PlainMLP(_InBlocks):
    """A drop-in for an MLP with one product up."""

    def __init__(self, up: PackedLinear, down: PackedLinear, activation: Activation) -> None:
        super().__init__(up.in_features)
        self.up, self.down = up.followed_by(activation), down

    def _block(self, rows: Tensor) -> Tensor:
        return self.down.forward(self.up.forward(rows))


def fuse_mlps(model: nn.Module) -> int:
    """Replace every MLP of packed linear layers; return how many were replaced."""
    return replace_modules(model, _fused, rtol=2e-2, atol=2e-2)


def _fused(module: nn.Module) -> GatedMLP | MergedMLP | PlainMLP | None:
    for *names, name in (*_GATED_NAMES, _PLAIN_NAMES):
        parts = _packed_parts(module, names)
        activation = activation_of(getattr(module, name, None))
        if not parts or activation is None:
            continue
        if len(parts) == len(_PLAIN_NAMES) - 1:
            return PlainMLP(parts[0], parts[1], activation)
        gate, up, down = parts
        merged = [each.packed for each in (gate, up) if can_merge(each.packed)]
        if len(merged) == 2 and (merged[0].channels is None) == (merged[1].channels is None):
            return MergedMLP(Panels.gated(*merged), down, activation)
        return GatedMLP(gate, up, down, activation)
    return None


def can_merge(packed: Weight) -> TypeGuard[Panels]:
    """Return whether it can be one product with another weight of its kind."""
    return isinstance(packed, Panels) and packed.outputs % _WHOLE_PANEL == 0


def _packed_parts(module: nn.Module, names: list[str]) -> list[PackedLinear]:
    """Return the packed linear layers of these names; none where one is missing or isn't packed."""
    parts = [getattr(module, name, None) for name in names]
    packed = [part for part in parts if isinstance(part, PackedLinear)]
    return packed if len(packed) == len(names) else []
