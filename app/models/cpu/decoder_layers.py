"""All layers of a frozen decoder of the Llama kind in one native call a step (native/decoder.h).

Between the products of a layer, Python and torch take as long as a product of few rows does.
"""

import ctypes
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from app.models.attention.kv_cache import KVCache
from app.models.attention.metadata import StepMetadata
from app.models.cpu.library import load_library
from app.models.cpu.products import Activation, Panels
from app.sites import Site

_POINTER, _LONG, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_ARGUMENTS: list[Any] = [
    *(_POINTER, _LONG, _POINTER, _FLOAT, _FLOAT, _POINTER, _LONG, _POINTER),
    *(_LONG, _POINTER, _POINTER, _POINTER, _LONG, _INT),
]


class DecoderShape(NamedTuple):
    """`DecoderShape` of native/decoder.h, in its order."""

    hidden: int
    heads: int
    kv_heads: int
    width: int
    rotary: int
    inner: int
    activation: Activation


class DecoderLayer(NamedTuple):
    """A layer's weights: `DecoderLayer` of native/decoder.h up to the pools, in its order."""

    qkv: Panels
    o: Panels
    gate_up: Panels
    down: Panels
    norms: tuple[Tensor | None, ...]  # input, MLP, query, key

    @property
    def addresses(self) -> list[int]:
        """Return where they lie."""
        panels = [
            address for each in (self.qkv, self.o, self.gate_up, self.down) for address in each.addresses
        ]
        return panels + [0 if norm is None else norm.data_ptr() for norm in self.norms]


class FusedLayers(nn.Module):
    """Stands in a decoder's list of layers for all of them."""

    def __init__(
        self,
        layers: list[DecoderLayer],
        numbers: list[int],
        shape: DecoderShape,
        *,
        epsilon: float,
        scaling: float,
    ) -> None:
        """`numbers` are those of the layers in the K/V cache."""
        super().__init__()
        self._layers = layers
        self._numbers = numbers
        self._shape = np.array(shape, np.int64)
        self._epsilon, self._scaling = epsilon, scaling
        self._call = load_library().promptplex_decoder_layers
        self._call.argtypes, self._call.restype = _ARGUMENTS, None
        self._tables: WeakKeyDictionary[KVCache, NDArray[np.int64]] = (
            WeakKeyDictionary()
        )  # with a cache's pools

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        metadata: StepMetadata,
        **_: Any,
    ) -> Tensor:
        """Return the last layer's output `[1, T, d]` for embeddings; zeros where no logits are wanted."""
        hidden = hidden_states[0].clone(memory_format=torch.contiguous_format)
        cos, sin = (part[0].contiguous() for part in position_embeddings)
        table, groups = self._layers_over(metadata.cache), _groups(metadata)
        self._call(
            *(table.ctypes.data, len(table), self._shape.ctypes.data, self._epsilon, self._scaling),
            *(
                groups.ctypes.data,
                len(groups),
                hidden.data_ptr(),
                len(hidden),
                cos.data_ptr(),
                sin.data_ptr(),
            ),
            *(metadata.logit_rows.data_ptr(), len(metadata.logit_rows), torch.get_num_threads()),
        )
        return hidden.unsqueeze(0)

    def _layers_over(self, cache: KVCache) -> NDArray[np.int64]:
        if cache not in self._tables:
            rows = []
            for number, layer in zip(self._numbers, self._layers, strict=True):
                place = (Site.DECODER_SELF, number)
                pools = [pool.data_ptr() for pool in cache.pools(place)]
                rows.append([*layer.addresses, *pools, cache.group_of_layer[place]])
            self._tables[cache] = np.array(rows, np.int64)
        return self._tables[cache]


def _groups(metadata: StepMetadata) -> NDArray[np.int64]:
    """Return the step's `StepGroup`s of native/decoder.h."""
    rows = []
    for group, kv_group in zip(metadata.groups, metadata.cache.groups, strict=True):
        assert group.write_slots is not None
        window = kv_group.geometry.window or 0
        rows.append([*group.layout.arguments, window, group.write_slots.data_ptr()])
    return np.array(rows, np.int64)
