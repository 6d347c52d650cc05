"""Faster modules in place of a model's own, the reference that each is compared with before it is used."""

from collections.abc import Callable
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

_ROWS_COMPARED = 3


class Replacement(Protocol):
    """A module that takes `[..., in_features]` in bf16."""

    in_features: int

    def __call__(self, inputs: Tensor) -> Tensor: ...


Faster = TypeVar("Faster", bound=Replacement)


def replace_modules(
    model: nn.Module, make: Callable[[nn.Module], Faster | None], *, rtol: float, atol: float
) -> int:
    """Put what `make` returns in the place of each submodule; None leaves it. Return how many were replaced.

    Outputs must agree within `rtol` and `atol`, a share of the largest output; else the submodule stays.
    """
    num_replaced = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            faster = make(child)
            if faster is not None and _agree(faster, child, rtol, atol):
                setattr(parent, name, faster)
                num_replaced += 1
    return num_replaced


@torch.inference_mode()
def _agree(faster: Replacement, module: nn.Module, rtol: float, atol: float) -> bool:
    """Modules of other kinds with the same parts differ, or fail with these inputs."""
    width = faster.in_features
    inputs = torch.linspace(-2, 3, _ROWS_COMPARED * width).view(1, _ROWS_COMPARED, width).to(torch.bfloat16)
    try:
        expected = cast(Tensor, module(inputs))
        largest = float(expected.abs().max())
        return torch.allclose(faster(inputs), expected, rtol=rtol, atol=atol * largest)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False
