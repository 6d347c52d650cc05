"""The protocol between the engine and a base model."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from app.models.attention.backend import AttentionBackend
from app.models.attention.kv_cache import KVCache, KVGroup
from app.models.attention.metadata import PackedItem, PackedSource, StepMetadata
from app.prompt import ModelGeometry, Prompt
from app.sites import Embedding


class Backbone(Protocol):
    """A frozen base model on packed tokens. T tokens of a step, d embedding width, V vocabulary.

    Encoder-decoders run the sources of a step first, S rows together, then the decoder's T tokens.
    """

    geometry: ModelGeometry
    kv_groups: tuple[KVGroup, ...]  # by site: decoder self, then decoder cross, then encoder self
    backends: Sequence[AttentionBackend[Any]]  # per KV group
    device: torch.device
    dtype: torch.dtype
    num_parameters: int

    def embed(self, token_ids: Tensor) -> Tensor:
        """Return input embeddings `[T, d]` of `token_ids [T]`, as the model itself scales them."""
        ...

    def embed_source(self, token_ids: Tensor, *, follows_soft_prompt: bool) -> Tensor:
        """Return the encoder's input embeddings of `token_ids`; what scales them may depend on the prompt."""
        ...

    def plan(
        self,
        cache: KVCache,
        items: Sequence[PackedItem],
        logit_rows: NDArray[np.int64],
        sources: Sequence[PackedSource] = (),
    ) -> StepMetadata:
        """Build what `forward` needs of a step; items of one token come first.

        `logit_rows [N]`, at least one, are the tokens of the packed row with wanted logits. `sources` are
        encoded in this step; each has an item that reads it.
        """
        ...

    def forward(
        self, embeds: Tensor, positions: Tensor, metadata: StepMetadata, source_embeds: Tensor | None = None
    ) -> Tensor:
        """Run `embeds [T, d]` at `positions [T]`; return logits `[N, V]` of `metadata.logit_rows`.

        Logits are of the dtype that the head gives. Keys and values of all T tokens, and of the sources'
        rows `source_embeds [S, d]` in cross-attention, are written to `metadata.cache`.
        """
        ...

    def prompt_embeddings(self, prompt: Prompt, place: Embedding = Embedding.DECODER) -> Tensor:
        """Return a soft prompt's rows `[p, d]` in the base's dtype, on its device."""
        ...

    def own_tensor(self, name: str) -> Tensor | None:
        """Return the base's own embedding tensor `[V, ...]` named so in checkpoints; None: it has none."""
        ...

    def write_prefix(self, prompt: Prompt, cache: KVCache, slots: tuple[Tensor, ...]) -> None:
        """Put a prefix's keys and values as they are at `slots`: per KV group, of its last rows, `[<= p]`.

        A group of a site that the prefix doesn't have gets no slots.
        """
        ...
