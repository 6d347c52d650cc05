"""The last layer's MLP for the tokens with wanted logits, and no others.

The last layer has to leave keys and values of all a prompt's tokens, but only the last token's output is
read. Leaving out the MLP of the others saves nearly a layer's work in each prefill.
"""

from typing import Any

import torch
from torch import Tensor, nn


class OnlySampled(nn.Module):
    """A token-wise module that computes the sampled rows; the others come out as zeros, unread."""

    def __init__(self, module: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self._module = module
        self._rows: Tensor | None = None  # [N], of the call of `layer` that goes on; None: all
        layer.register_forward_pre_hook(self._take_rows, with_kwargs=True)

    def _take_rows(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the rows of a call: the layer gets the metadata, for its attention, its MLP doesn't."""
        metadata = kwargs.get("metadata")
        self._rows = None if metadata is None else metadata.logit_rows

    def forward(self, inputs: Tensor) -> Tensor:
        """Return `[1, T, d]` for `inputs [1, T, d]`."""
        rows = self._rows
        if rows is None or len(rows) == inputs.shape[1]:
            everything: Tensor = self._module(inputs)
            return everything
        outputs = torch.zeros_like(inputs)
        outputs[:, rows] = self._module(inputs[:, rows])
        return outputs


def skip_unread_rows(model: nn.Module, kinds: tuple[type[nn.Module], ...], num_layers: int) -> bool:
    """Wrap the last layer's MLP where it is of one of `kinds`; return whether it was there.

    Nothing may follow it that mixes tokens: it is looked for as `<layers>.<last number>.<name>`. The probe
    of the real weights, which runs several chunks, would notice it if it were otherwise.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, kinds) and name.split(".")[-2:-1] == [str(num_layers - 1)]:
            parent, _, child = name.rpartition(".")
            layer = model.get_submodule(parent)
            setattr(layer, child, OnlySampled(module, layer))
            return True
    return False
