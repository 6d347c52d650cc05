"""Gated MLPs of a frozen model on a CPU: fewer passes over wide activations.

`down(act(gate(x)) * up(x))` as transformers writes it makes four tensors of the intermediate width
and reads them again. Here activation and product are one pass (our own kernel, or a oneDNN post-op
where there is none), and long inputs go through in blocks of rows, so that their activations stay in the
cache.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from app.models.cpu.library import Kernels
from app.models.cpu.packed_linear import PackedLinear
from app.models.cpu.replacement import replace_modules

_BLOCK_ROWS = 512  # enough for full speed of the products, few enough for the last cache level

Activation = Callable[[Tensor], Tensor]


class GatedMLP(nn.Module):
    """A drop-in for an MLP with `gate_proj`, `up_proj`, `down_proj` and `act_fn`."""

    def __init__(
        self,
        gate: PackedLinear,
        up: PackedLinear,
        down: PackedLinear,
        activation: Activation,
        kernels: Kernels | None,  # given: they compute this activation
    ) -> None:
        super().__init__()
        self._gate, self._up, self._down = gate, up, down
        self._activation = activation
        self._kernels = kernels
        self.in_features = gate.in_features

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
        gate: Tensor = self._gate(rows)
        if self._kernels is not None:
            wide = self._kernels.silu_times_(gate, self._up(rows))
        else:
            wide = self._up.times(rows, self._activation(gate))
        product: Tensor = self._down(wide)
        return product


def fuse_gated_mlps(model: nn.Module, kernels: Kernels | None) -> int:
    """Replace every gated MLP of packed linear layers; return how many were replaced."""
    return replace_modules(model, lambda module: _fused(module, kernels), rtol=2e-2, atol=2e-2)


def _fused(module: nn.Module, kernels: Kernels | None) -> GatedMLP | None:
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    activation = getattr(module, "act_fn", None)
    gate, up, down = (part if isinstance(part, PackedLinear) else None for part in parts)
    if gate is None or up is None or down is None or activation is None:
        return None
    is_silu = type(activation).__name__ in ("SiLU", "SiLUActivation")
    return GatedMLP(gate, up, down, activation, kernels if is_silu else None)
