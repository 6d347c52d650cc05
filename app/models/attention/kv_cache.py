"""Where keys and values live on the device: fixed slots, one per token, per layer.

Shapes: S slots, Hk kv heads, Dk key width, Dv value width. A slot's row holds all heads of one
token contiguously. Slot 0 is never allocated: it stays zero and padding points to it. Nor is slot 1: rows
that are there to fill up a step write to it, and nothing reads it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from app.models.attention.row_writer import row_writer
from app.prompt import LayerGeometry
from app.sites import Site

PADDING_SLOT, TRASH_SLOT = 0, 1

Slots = NDArray[np.int64]
Layer = tuple[Site, int]  # a site and the number of a layer there
_ORDER = (Site.DECODER_SELF, Site.DECODER_CROSS, Site.ENCODER_SELF)  # of a backbone's groups


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers of a site that share block numbers: same heads, widths and window."""

    site: Site
    geometry: LayerGeometry
    layers: tuple[int, ...]

    def bytes_per_slot(self, dtype: torch.dtype) -> int:
        """Return the bytes that one token takes in all layers of the group."""
        return len(self.layers) * self.geometry.kv_width * dtype.itemsize


def group_layers(layers: Mapping[Site, Sequence[LayerGeometry]]) -> tuple[KVGroup, ...]:
    """Gather a site's layers of equal geometry into groups, by site, then in order of first appearance."""
    members: dict[tuple[Site, LayerGeometry], list[int]] = {}
    for site in _ORDER:
        for index, geometry in enumerate(layers.get(site, ())):
            members.setdefault((site, geometry), []).append(index)
    return tuple(KVGroup(*key, tuple(indices)) for key, indices in members.items())


class KVCache:
    """Device memory for keys and values of all layers."""

    def __init__(
        self,
        groups: Sequence[KVGroup],
        num_slots: Sequence[int],  # per pool
        *,
        dtype: torch.dtype,
        device: torch.device,
        pools: Sequence[int] | None = None,  # per group, the number of its pool; None: each has its own
    ) -> None:
        """Groups of one pool have layers of the same shapes, as many each, and share slot numbers."""
        self.groups = tuple(groups)
        self.device = device
        self._writers = [row_writer(group.geometry, dtype, device) for group in self.groups]
        self.group_of_layer: dict[Layer, int] = {}
        self._pools: dict[Layer, tuple[Tensor, Tensor]] = {}  # keys [S, Hk * Dk], values [S, Hk * Dv]
        pools = pools or range(len(self.groups))
        self._memory: dict[int, list[tuple[Tensor, Tensor]]] = {}  # of a pool: one for a layer of each group
        for number, (group, pool) in enumerate(zip(self.groups, pools, strict=True)):
            heads, geometry = group.geometry.num_kv_heads, group.geometry
            memory = self._memory.setdefault(pool, [])
            for place, layer in enumerate(group.layers):
                if place == len(memory):
                    widths = (heads * geometry.key_dim, heads * geometry.value_dim)
                    keys, values = (_pool(num_slots[pool], width, dtype, device) for width in widths)
                    memory.append((keys, values))
                self.group_of_layer[group.site, layer] = number
                self._pools[group.site, layer] = memory[place]

    def write(self, layer: Layer, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store `keys [n, Hk, Dk]` and `values [n, Hk, Dv]` at `slots [n]`."""
        self._writers[self.group_of_layer[layer]](self._pools[layer], slots, keys, values)

    def copy(self, pool: int, sources: Tensor, targets: Tensor) -> None:
        """Copy slots `sources [n]` of a pool to `targets [n]`, which are no sources, in all its layers."""
        for memory in self._memory[pool]:
            for rows in memory:
                rows.index_copy_(0, targets, rows[sources])

    def pools(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Return all keys `[S, Hk * Dk]` and values `[S, Hk * Dv]` of a layer, where they lie."""
        return self._pools[layer]


def _pool(num_slots: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    pool = torch.empty(num_slots, width, dtype=dtype, device=device)
    # What padding reads must be finite (0 x NaN = NaN). All other slots are written before they are
    # read, and memory that is never touched costs nothing on a CPU.
    pool[PADDING_SLOT].zero_()
    return pool
