"""How an encoder-decoder knows positions, taken over so that packed rows have their own.

Learned and sinusoidal tables count from 0 in transformers' stacks; T5's biases are dense matrices of all
pairs of tokens. Both are found by what modules do, whatever they are called. d embedding width, H heads.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from app.errors import UnsupportedModel

EXAMPLE_ROWS = 3  # that a stack is given, to find its table


class PackedPositions(nn.Module):
    """A stack's position embeddings for the positions that its call is given, in place of its own module."""

    def __init__(self, table: Tensor, stack: nn.Module) -> None:
        """`table [positions, d]`: position 0 first."""
        super().__init__()
        self.weight = nn.Parameter(table, requires_grad=False)
        self._positions: Tensor | None = None  # [T], of the call of `stack` that goes on
        stack.register_forward_pre_hook(self._take_positions, with_kwargs=True)

    def _take_positions(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._positions = kwargs["positions"]

    def forward(self, *_: Any, **__: Any) -> Tensor:
        """Return `[1, T, d]`, whatever the stack says of its tokens."""
        assert self._positions is not None
        return functional.embedding(self._positions, self.weight).unsqueeze(0)


def take_positions(stack: nn.Module, run: Callable[[], object], needed: int) -> bool:
    """Replace the stack's table of positions, if it has one; return whether it has.

    `run` passes input embeddings `[1, 3, d]` through the stack, which are no ids'.

    Raise UnsupportedModel: what it adds are no rows of a table in order, or too few for `needed` positions.
    """
    shown: dict[str, Tensor] = {}
    hooks = [
        child.register_forward_hook(lambda _, __, out, name=name: shown.setdefault(name, out))
        for name, child in stack.named_children()
        if _table(child) is not None
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    for name, rows in shown.items():
        table = _from_the_first(stack.get_submodule(name), rows.reshape(-1, rows.shape[-1]))
        if len(table) < needed:
            raise UnsupportedModel(
                f"it has embeddings of {len(table)} positions, and its configuration says {needed}"
            )
        setattr(stack, name, PackedPositions(table, stack))
    return bool(shown)


def _table(module: nn.Module) -> Tensor | None:
    """Return a module's own table; containers of layers have none."""
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return own[0].detach() if len(own) == 1 and own[0].ndim == 2 else None


def _from_the_first(module: nn.Module, shown: Tensor) -> Tensor:
    """Return a table's rows from that of position 0 on; `shown` are those of positions 0, 1, 2."""
    table = _table(module)
    assert table is not None
    is_first = (table.unfold(0, EXAMPLE_ROWS, 1) == shown.T).all(dim=(1, 2))  # [rows - 2, d, 3]
    if not is_first.any():
        raise UnsupportedModel(
            f"what its {type(module).__name__} adds to tokens in order are no consecutive rows of a table"
        )
    return table[int(is_first.nonzero()[0]) :]


def take_biases(stack: nn.Module) -> bool:
    """Make attention get tables of biases instead of dense matrices; return whether the stack has biases.

    A table `[H, 2M + 1]` holds the biases of distances -M to M. The bias of a layer without a table of its
    own is none, which spares zeros for every pair of tokens.

    Raise UnsupportedModel: biases change beyond the greatest distance that the model names.
    """
    modules = [module for module in stack.modules() if hasattr(module, "has_relative_attention_bias")]
    for module in modules:
        table = _bias_table(module) if module.has_relative_attention_bias else None
        module.has_relative_attention_bias = True  # type: ignore[assignment]  # it asks for a bias then
        module.compute_bias = lambda *_, _table=table, **__: _table  # type: ignore[assignment]
    return bool(modules)


def _bias_table(module: Any) -> Tensor:
    furthest = int(module.relative_attention_max_distance)
    beyond = 4 * furthest
    # One query in the midst of keys: the row of a dense matrix in which every distance stands once.
    row: Tensor = module.compute_bias(1, 2 * beyond + 1, past_seen_tokens=beyond)[0, :, 0]  # [H, distances]
    table = row[:, beyond - furthest : beyond + furthest + 1]
    clamped = functional.pad(table[None], (beyond - furthest,) * 2, mode="replicate")[0]
    if not torch.equal(clamped, row):
        raise UnsupportedModel(
            f"its biases differ at distances beyond {furthest}, the greatest that it names"
        )
    return table.detach().contiguous()
