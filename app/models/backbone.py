"""The protocol between the engine and a base model."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from app.models.attention.kv_cache import KVCache, KVGroup
from app.models.attention.metadata import PackedItem, StepMetadata
from app.prompt import ModelGeometry, Prompt


class Backbone(Protocol):
    """A frozen base model on packed tokens. T tokens of a step, d embedding width, V vocabulary."""

    geometry: ModelGeometry
    kv_groups: tuple[KVGroup, ...]
    device: torch.device
    dtype: torch.dtype

    def embed(self, token_ids: Tensor) -> Tensor:
        """Return input embeddings `[T, d]` of `token_ids [T]`, as the model itself scales them."""
        ...

    def plan(
        self, cache: KVCache, items: Sequence[PackedItem], logit_rows: NDArray[np.int64]
    ) -> StepMetadata:
        """Build what `forward` needs of a step; items of one token come first.

        `logit_rows [N]`, at least one, are the tokens of the packed row with wanted logits.
        """
        ...

    def forward(self, embeds: Tensor, positions: Tensor, metadata: StepMetadata) -> Tensor:
        """Run `embeds [T, d]` at `positions [T]`; return float32 logits `[N, V]` of `metadata.logit_rows`.

        Keys and values of all T tokens are written to `metadata.cache`.
        """
        ...

    def prompt_embeddings(self, prompt: Prompt) -> Tensor:
        """Return a soft prompt's rows `[p, d]` in the base's dtype, on its device."""
        ...

    def own_tensor(self, name: str) -> Tensor | None:
        """Return the base's own embedding tensor `[V, ...]` named so in checkpoints; None: it has none."""
        ...

    def write_prefix(self, prompt: Prompt, cache: KVCache, slots: tuple[Tensor, ...]) -> None:
        """Put a prefix's keys and values as they are at `slots`: per KV group, of its last rows, `[<= p]`."""
        ...
