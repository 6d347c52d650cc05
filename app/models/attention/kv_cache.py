"""Where keys and values live on the device: fixed slots, one per token, per layer.

Shapes: S slots, Hk kv heads, Dk key width, Dv value width. A slot's row holds all heads of one
token, so that a row is contiguous and a gather is one `embedding` call (on CPUs many times
faster than advanced indexing). Slot 0 is never allocated: it stays zero and padding points to it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from app.models.cpu.library import kernels_for
from app.prompt import LayerGeometry
from app.sites import Site

PADDING_SLOT = 0


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers of a site that share block numbers: same heads, widths and window."""

    site: Site
    geometry: LayerGeometry
    layers: tuple[int, ...]

    def bytes_per_slot(self, dtype: torch.dtype) -> int:
        """Bytes that one token takes in all layers of the group."""
        return len(self.layers) * self.geometry.kv_width * dtype.itemsize


def group_layers(layers: Mapping[Site, Sequence[LayerGeometry]]) -> tuple[KVGroup, ...]:
    """Gather a site's layers of equal geometry into groups, in order of first appearance."""
    members: dict[tuple[Site, LayerGeometry], list[int]] = {}
    for site, geometries in layers.items():
        for index, geometry in enumerate(geometries):
            members.setdefault((site, geometry), []).append(index)
    return tuple(KVGroup(*key, tuple(indices)) for key, indices in members.items())


class KVCache:
    """Device memory for keys and values of all layers."""

    def __init__(
        self,
        groups: Sequence[KVGroup],
        num_slots: Sequence[int],  # per group
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.groups = tuple(groups)
        self.dtype = dtype
        self.device = device
        self.kernels = kernels_for(dtype, device)
        self.group_of_layer: dict[int, int] = {}
        self._geometry: dict[int, LayerGeometry] = {}
        self._keys: dict[int, Tensor] = {}  # layer -> [S, Hk * Dk]
        self._values: dict[int, Tensor] = {}  # layer -> [S, Hk * Dv]
        for number, (group, slots) in enumerate(zip(self.groups, num_slots, strict=True)):
            for layer in group.layers:
                self._add_layer(layer, number, group.geometry, slots)

    def _add_layer(self, layer: int, group: int, geometry: LayerGeometry, num_slots: int) -> None:
        self.group_of_layer[layer] = group
        self._geometry[layer] = geometry
        for store, width in ((self._keys, geometry.key_dim), (self._values, geometry.value_dim)):
            store[layer] = torch.empty(
                num_slots, geometry.num_kv_heads * width, dtype=self.dtype, device=self.device
            )
            # What padding reads must be finite (0 x NaN = NaN). All other slots are written before
            # they are read, and memory that is never touched costs nothing on a CPU.
            store[layer][PADDING_SLOT].zero_()

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store `keys [n, Hk, Dk]` and `values [n, Hk, Dv]` at `slots [n]`."""
        self._keys[layer].index_copy_(0, slots, keys.reshape(slots.shape[0], -1))
        self._values[layer].index_copy_(0, slots, values.reshape(slots.shape[0], -1))

    def pools(self, layer: int) -> tuple[Tensor, Tensor]:
        """All keys `[S, Hk * Dk]` and values `[S, Hk * Dv]` of a layer, where they lie."""
        return self._keys[layer], self._values[layer]

    def read(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Gather `slots [..., n]` as keys `[..., Hk, n, Dk]` and values `[..., Hk, n, Dv]`."""
        heads = self._geometry[layer].num_kv_heads
        keys = functional.embedding(slots, self._keys[layer])
        values = functional.embedding(slots, self._values[layer])
        return (
            keys.view(*slots.shape, heads, -1).transpose(-3, -2),
            values.view(*slots.shape, heads, -1).transpose(-3, -2),
        )
