"""RMS norms of a frozen bf16 model on a CPU, in one pass instead of eight."""

from typing import cast

import torch
from torch import Tensor, nn

from app.models.cpu.library import Kernels
from app.models.cpu.replacement import replace_modules

_NAMES = ("RMSNorm", "T5LayerNorm")


class RMSNorm(nn.Module):
    """A drop-in for transformers' norms of the Llama kind: `weight * (x / rms(x))`, rounded in between."""

    def __init__(self, weight: Tensor, epsilon: float, kernels: Kernels) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self._weight = weight.detach()  # not a parameter, which every call would look up by name
        self.in_features = len(weight)
        self._epsilon = epsilon
        self._kernels = kernels

    def forward(self, inputs: Tensor) -> Tensor:
        """Return `[..., d]` for `inputs [..., d]`."""
        return self._kernels.rms_norm(inputs, self._weight, self._epsilon)


def fuse_rms_norms(model: nn.Module, kernels: Kernels) -> int:
    """Replace every RMS norm of this formula (Gemma's is another); return how many were replaced."""
    return replace_modules(model, lambda module: _fused(module, kernels), rtol=1e-2, atol=1e-3)


def epsilon_of(module: nn.Module) -> float | None:
    """Return the epsilon of what looks like an RMS norm of whole vectors in bf16; None: it doesn't."""
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith(_NAMES) or not isinstance(epsilon, float):
        return None
    if not isinstance(weight, Tensor) or weight.dtype != torch.bfloat16 or weight.ndim != 1:
        return None
    return (
        epsilon if weight.is_cpu and weight.is_contiguous() and Kernels.can_normalise(len(weight)) else None
    )


def _fused(module: nn.Module, kernels: Kernels) -> RMSNorm | None:
    epsilon = epsilon_of(module)
    return None if epsilon is None else RMSNorm(cast(Tensor, module.weight), epsilon, kernels)
