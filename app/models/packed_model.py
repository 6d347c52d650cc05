"""What every backbone over a transformers model has in common."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from app.models.attention.backend import AttentionBackend
from app.models.attention.kv_cache import KVCache, group_layers
from app.models.attention.metadata import PackedItem, PackedSource, StepMetadata, plan_step
from app.models.attention.registry import choose_backend
from app.models.own_tensors import DTYPES, own_tensor
from app.models.transfer import tensor_to_device
from app.prompt import ModelGeometry, Prompt
from app.sites import SIDES, Embedding


def tensor_of(prompt: Prompt, name: str) -> Tensor:
    """Return a prompt's tensor in its stored dtype, on the CPU."""
    info = prompt.tensors[name]
    raw = torch.frombuffer(bytearray(prompt.tensor_bytes(name)), dtype=DTYPES[info.dtype])
    return raw.view(info.shape)


class PackedModel:
    """A model that was loaded with our attention implementation (attention/packed.py)."""

    def __init__(self, model: PreTrainedModel, geometry: ModelGeometry) -> None:
        """`geometry` was recorded from this very model, which no kernels have changed yet."""
        self.geometry = geometry
        self.kv_groups = group_layers(geometry.layers)
        self.device = model.device
        self.dtype = model.dtype
        self.num_parameters = model.num_parameters()
        self.model = model
        self.backends: Sequence[AttentionBackend[Any]] = [
            choose_backend(group.geometry, self.dtype, self.device) for group in self.kv_groups
        ]

    def plan(
        self,
        cache: KVCache,
        items: Sequence[PackedItem],
        logit_rows: NDArray[np.int64],
        sources: Sequence[PackedSource] = (),
    ) -> StepMetadata:
        return plan_step(cache, self.backends, items, logit_rows, sources)

    def prompt_embeddings(self, prompt: Prompt, place: Embedding = Embedding.DECODER) -> Tensor:
        return self._on_device(prompt, place)

    def own_tensor(self, name: str) -> Tensor | None:
        return own_tensor(self.model, name)

    def write_prefix(self, prompt: Prompt, cache: KVCache, slots: tuple[Tensor, ...]) -> None:
        for (site, layer), group in cache.group_of_layer.items():
            if not len(slots[group]):
                continue
            keys, values = (
                self._on_device(prompt, site.tensor(layer, side)).transpose(0, 1) for side in SIDES
            )
            last = slice(-len(slots[group]), None)
            cache.write((site, layer), slots[group], keys[last], values[last])

    def _on_device(self, prompt: Prompt, name: str) -> Tensor:
        return tensor_to_device(tensor_of(prompt, name), self.device).to(self.dtype)
