"""What computes attention: one backend per kind of device, chosen once for each KV group.

Shapes: T packed tokens of a step, H query heads, Hk kv heads, S slots of the K/V cache, D key width,
Dv value width.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from app.models.attention.kv_cache import Slots
from app.prompt import LayerGeometry

Layout = TypeVar("Layout")
FilledLayout = TypeVar("FilledLayout", covariant=True)


class Head(NamedTuple):
    """Leading slots of a context, which are those of every context with this id among its heads."""

    id: int
    num_slots: int


class Context(NamedTuple):
    """What consecutive tokens of one sequence, or of one source, attend to in one KV group."""

    num_tokens: int
    slots: Slots  # of the pools: all that any of the tokens can see
    has_own: bool = True  # the last `num_tokens` slots are the tokens' own; False in cross-attention
    # Runs of leading slots that other contexts may begin with too, the shortest first: contexts with the same
    # id begin with the same slots. Empty also where it isn't known.
    heads: tuple[Head, ...] = ()


class AttentionBackend(Protocol[Layout]):
    """Computes attention for layers of one geometry. It keeps nothing of a step.

    `plan` runs once a step and builds every tensor that `forward` needs beside the layer's own inputs, so
    that the passes through the layers only compute. A new backend is a module beside this one and a line
    in `registry.py`.
    """

    def __init__(self, geometry: LayerGeometry, dtype: torch.dtype, device: torch.device) -> None: ...

    @staticmethod
    def supports(geometry: LayerGeometry, dtype: torch.dtype, device: torch.device) -> bool:
        """Return whether layers of this geometry can be computed exactly on this machine."""
        ...

    def plan(self, contexts: Sequence[Context]) -> Layout:
        """Lay out a step, in the order of the packed row.

        Decoders' contexts of one token come first. Sources, which an encoder reads, come in any order.
        """
        ...

    def forward(
        self,
        query: Tensor,  # [H, T, D]
        key: Tensor,  # [Hk, T, D]
        value: Tensor,  # [Hk, T, Dv]
        pools: tuple[Tensor, Tensor],  # keys [S, Hk * D] and values [S, Hk * Dv], with the step's own
        layout: Layout,
        *,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None,  # [H]
        position_bias: Tensor | None,  # [H, 2M + 1], where the geometry has one
    ) -> Tensor:
        """Return attention of each context's tokens over its slots, `[T, H, Dv]`: causal, or to all of them.

        In cross-attention `key` and `value` are the step's new sources', already written to the pools.
        Column `M + distance` of `position_bias` is added to a query's scores of the keys at this distance:
        slot index of the key, minus that of the query. Distances beyond -M and M count as -M and M.
        """
        ...


class StaticLayout(Protocol[FilledLayout]):
    """A layout of decoding rows in buffers that never move, for a step that a CUDA graph replays."""

    @property
    def layout(self) -> FilledLayout:
        """What `forward` takes, the same for every step: its tensors are overwritten by `fill`."""
        ...

    def fits(self, contexts: Sequence[Context]) -> bool:
        """Return whether `fill` takes these contexts: not too many, and not too many slots in all."""
        ...

    def fill(self, contexts: Sequence[Context]) -> None:
        """Lay out a step, each context one token, on the device's current stream, without waiting for it.

        Further rows that the layout has are padding: they attend to the padding slot.
        """
        ...


@runtime_checkable
class GraphBackend(AttentionBackend[Layout], Protocol[Layout]):
    """A backend with passes that a CUDA graph may record: no shape or address depends on the contexts."""

    def static_layouts(self, num_rows: Sequence[int], max_slots: int) -> list[StaticLayout[Layout]]:
        """Return a layout for each of these numbers of rows, to be filled before it is recorded or runs.

        They share their memory: what was filled in is of one layout only. `max_slots`: of all contexts of
        a step together.
        """
        ...
