"""One copy of what two loads of a base have in common."""

import torch
from torch import nn


def share_weights(holder: nn.Module, other: nn.Module) -> int:
    """Let `other` use the tensors of `holder` that are the same in all but place; return the bytes saved.

    Both are frozen. What was converted or packed since it was loaded stays apart.
    """
    held = dict(holder.named_parameters(remove_duplicate=False))
    saved = 0
    for name, parameter in other.named_parameters(remove_duplicate=False):
        twin = held.get(name)
        if twin is None or twin.data_ptr() == parameter.data_ptr() or not _are_equal(twin, parameter):
            continue
        parameter.data = twin.data
        saved += parameter.nbytes
    return saved


def _are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    same = one.dtype == other.dtype and one.shape == other.shape and one.device == other.device
    return same and torch.equal(one, other)
