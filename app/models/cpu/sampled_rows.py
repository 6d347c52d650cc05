"""The last layer's MLP for the tokens whose logits are asked for, and no others.

Of a prompt's tokens, the last layer has to leave keys and values behind; what its MLP would make of
them nobody reads but for the last token. That is nearly a layer's work of each prefill.
"""

import torch
from torch import Tensor, nn


class SampledRows:
    """Which tokens of the packed row the current forward pass is asked about; None: all of them."""

    def __init__(self) -> None:
        self.current: Tensor | None = None  # [N]


class OnlySampled(nn.Module):
    """A token-wise module that computes the sampled rows; the others come out as zeros, unread."""

    def __init__(self, module: nn.Module, rows: SampledRows) -> None:
        super().__init__()
        self._module = module
        self._rows = rows

    def forward(self, inputs: Tensor) -> Tensor:
        """`inputs [1, T, d]` -> `[1, T, d]`."""
        rows = self._rows.current
        if rows is None or len(rows) == inputs.shape[1]:
            everything: Tensor = self._module(inputs)
            return everything
        outputs = torch.zeros_like(inputs)
        outputs[:, rows] = self._module(inputs[:, rows])
        return outputs


def skip_unread_rows(model: nn.Module, kind: type[nn.Module], num_layers: int, rows: SampledRows) -> bool:
    """Wrap the last layer's MLP where it is of `kind`; whether it was there.

    Nothing may follow it that mixes tokens: it is looked for as `<layers>.<last number>.<name>`. The probe
    of the real weights, which runs several chunks, would notice it if it were otherwise.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, kind) and name.split(".")[-2:-1] == [str(num_layers - 1)]:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, OnlySampled(module, rows))
            return True
    return False
