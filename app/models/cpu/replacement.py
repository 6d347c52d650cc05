"""Putting faster modules in the place of a model's own."""

from collections.abc import Callable

from torch import nn


def replace_modules(model: nn.Module, make: Callable[[nn.Module], nn.Module | None]) -> int:
    """Put what `make` gives in the place of each submodule; None leaves it. How many were replaced.

    `make` compares its module with the one that it is to replace: that one is the reference.
    """
    num_replaced = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            replacement = make(child)
            if replacement is not None:
                setattr(parent, name, replacement)
                num_replaced += 1
    return num_replaced
