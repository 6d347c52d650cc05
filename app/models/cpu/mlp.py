"""MLPs of a frozen model on a CPU: fewer passes over wide activations.

`down(act(gate(x)) * up(x))` as transformers writes it makes four tensors of the intermediate width
and reads them again. Here activation and product are one pass (our own kernel, or a oneDNN post-op
where there is none), and long inputs go through in blocks of rows, so that their activations stay in the
cache. In `down(act(up(x)))` the activation is a post-op of the first product.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from app.models.cpu.library import Kernels
from app.models.cpu.packed_linear import PackedLinear, PostOp
from app.models.cpu.replacement import replace_modules

_BLOCK_ROWS = 512  # enough for full speed of the products, few enough for the last cache level
_GATED_NAMES = (("gate_proj", "up_proj", "down_proj", "act_fn"), ("wi_0", "wi_1", "wo", "act"))
_PLAIN_NAMES = ("wi", "wo", "act")
_POST_OPS = {
    "ReLU": PostOp("relu"),
    "GELUActivation": PostOp("gelu", "none"),
    "GELUTanh": PostOp("gelu", "tanh"),
    "NewGELUActivation": PostOp("gelu", "tanh"),
}

Activation = Callable[[Tensor], Tensor]


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
        self,
        gate: PackedLinear,
        up: PackedLinear,
        down: PackedLinear,
        activation: Activation,
        kernels: Kernels | None,  # given: they compute this activation
    ) -> None:
        super().__init__(gate.in_features)
        self.gate, self.up, self.down = gate, up, down
        # A frozen model's products are called as functions: there are no hooks to look for.
        self._gate, self._up, self._down = gate.forward, up.forward, down.forward
        self._activation = activation
        self._kernels = kernels

    def _block(self, rows: Tensor) -> Tensor:
        gate = self._gate(rows)
        if self._kernels is not None:
            return self._down(self._kernels.silu_times_(gate, self._up(rows)))
        return self._down(self.up.times(rows, self._activation(gate)))


class PlainMLP(_InBlocks):
    """A drop-in for an MLP with one product up."""

    def __init__(self, up: PackedLinear, down: PackedLinear, activation: PostOp) -> None:
        super().__init__(up.in_features)
        self.up, self.down = up.followed_by(activation), down
        self._up, self._down = self.up.forward, down.forward

    def _block(self, rows: Tensor) -> Tensor:
        return self._down(self._up(rows))


def fuse_mlps(model: nn.Module, kernels: Kernels | None) -> int:
    """Replace every MLP of packed linear layers; return how many were replaced."""
    return replace_modules(model, lambda module: _fused(module, kernels), rtol=2e-2, atol=2e-2)


def _fused(module: nn.Module, kernels: Kernels | None) -> GatedMLP | PlainMLP | None:
    for *names, activation in _GATED_NAMES:
        if (parts := _packed_parts(module, names)) and hasattr(module, activation):
            function = getattr(module, activation)
            is_silu = type(function).__name__ in ("SiLU", "SiLUActivation")
            gate, up, down = parts
            return GatedMLP(gate, up, down, _in_one_pass(function), kernels if is_silu else None)
    *names, activation = _PLAIN_NAMES
    post_op = _POST_OPS.get(type(getattr(module, activation, None)).__name__)
    parts = _packed_parts(module, names)
    if post_op is None or not parts:
        return None
    up, down = parts
    return PlainMLP(up, down, post_op)


def _packed_parts(module: nn.Module, names: list[str]) -> list[PackedLinear]:
    """Return the packed linear layers of these names; none where one is missing or isn't packed."""
    parts = [getattr(module, name, None) for name in names]
    packed = [part for part in parts if isinstance(part, PackedLinear)]
    return packed if len(packed) == len(names) else []


def _in_one_pass(activation: Activation) -> Activation:
    """Return torch's own function where transformers writes it as eight."""
    if type(activation).__name__ == "NewGELUActivation":
        return partial(functional.gelu, approximate="tanh")
    return activation
