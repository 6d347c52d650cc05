"""The one door between the engine and a base model."""

from typing import Protocol

import torch
from torch import Tensor

from app.models.attention.kv_cache import KVCache, KVGroup
from app.models.attention.metadata import AttentionStep
from app.prompt import ModelGeometry, Prompt


class Backbone(Protocol):
    """A frozen base model on packed tokens. T tokens of a step, d embedding width, V vocabulary."""

    geometry: ModelGeometry
    kv_groups: tuple[KVGroup, ...]
    device: torch.device
    dtype: torch.dtype

    def embed(self, token_ids: Tensor) -> Tensor:
        """Input embeddings `[T, d]` of `token_ids [T]`, as the model itself scales them."""
        ...

    def forward(self, embeds: Tensor, positions: Tensor, step: AttentionStep, logit_rows: Tensor) -> Tensor:
        """Run `embeds [T, d]` at `positions [T]`; float32 logits `[N, V]` of `logit_rows [N]`.

        Keys and values of all T tokens are written to `step.cache`.
        """
        ...

    def prompt_embeddings(self, prompt: Prompt) -> Tensor:
        """A soft prompt's rows `[p, d]` in the base's dtype, on its device."""
        ...

    def own_tensor(self, name: str) -> Tensor | None:
        """The base's own embedding tensor `[V, ...]` that a checkpoint calls `name`; None: it has none."""
        ...

    def write_prefix(self, prompt: Prompt, cache: KVCache, slots: tuple[Tensor, ...]) -> None:
        """Put a prefix's keys and values as they are at `slots` (per KV group, `[p]`)."""
        ...
