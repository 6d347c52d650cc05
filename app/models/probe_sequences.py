"""Short sequences for the probes: their logits by the model's own attention alone, and packed.

n token ids, p rows of a soft prompt, d embedding width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from app.models.attention.kv_cache import KVCache, Slots
from app.models.attention.metadata import PackedItem
from app.models.attention.packed import IMPLEMENTATION
from app.models.decoder_only import DecoderOnly
from app.sites import Site


@dataclass(frozen=True, eq=False)
class ProbeSequence:
    """Teacher-forced tokens: rows of a soft prompt if there are some, then token ids."""

    ids: Tensor  # [n]
    chunks: list[int]  # how many rows each step takes
    soft: Tensor | None = None  # [p, d]
    prefix: tuple[tuple[Tensor, Tensor], ...] = ()  # per layer, K and V [1, Hk, slots, D]

    @property
    def prefix_length(self) -> int:
        """Slots of the prefix."""
        return self.prefix[0][0].shape[2] if self.prefix else 0

    @property
    def ends(self) -> NDArray[np.int64]:
        """The last row of each chunk."""
        return np.cumsum(self.chunks) - 1

    def rows(self, embed: Callable[[Tensor], Tensor]) -> Tensor:
        """Return input embeddings `[p + n, d]`."""
        own = embed(self.ids)
        return own if self.soft is None else torch.cat([self.soft, own])


def eager_logits(model: PreTrainedModel, **inputs: Any) -> Tensor:
    """Return logits `[n, V]` of the only row of `inputs`, by the model's own attention."""
    model.set_attn_implementation("eager")
    try:
        logits: Tensor = model(**inputs).logits[0].float()
    finally:
        model.set_attn_implementation(IMPLEMENTATION)
    return logits


def own_logits_of(model: PreTrainedModel, sequence: ProbeSequence) -> Tensor:
    """Return logits `[p + n, V]` of all rows by the model's own attention, alone, in one pass."""
    cache = DynamicCache(config=model.config) if sequence.prefix else None
    for layer, (keys, values) in enumerate(sequence.prefix):
        assert cache is not None
        cache.update(keys, values, layer)
    num_slots = sequence.prefix_length + sum(sequence.chunks)
    ones = torch.ones(1, num_slots, dtype=torch.long, device=model.device)
    common = {"attention_mask": ones, "past_key_values": cache, "use_cache": cache is not None}
    if sequence.soft is None:
        return eager_logits(model, input_ids=sequence.ids.unsqueeze(0), **common)
    embeds = sequence.rows(model.get_input_embeddings())
    return eager_logits(model, inputs_embeds=embeds.unsqueeze(0), **common)


def packed_logits(backbone: DecoderOnly, sequences: list[ProbeSequence]) -> list[Tensor]:
    """Return logits `[chunks, V]` at the ends of each sequence's chunks; all sequences share steps."""
    length = max(each.prefix_length + sum(each.chunks) for each in sequences)
    num_slots = [1 + length * len(sequences)] * len(backbone.kv_groups)
    cache = KVCache(backbone.kv_groups, num_slots, dtype=backbone.dtype, device=backbone.device)
    # Interleaved on purpose: identity tables would hide a wrong slot.
    tables = [np.arange(length) * len(sequences) + 1 + number for number in range(len(sequences))]
    for sequence, table in zip(sequences, tables, strict=True):
        for layer, kv in enumerate(sequence.prefix):
            slots = torch.from_numpy(table[: sequence.prefix_length])
            cache.write((Site.DECODER_SELF, layer), slots, *(rows[0].transpose(0, 1) for rows in kv))
    collected: list[list[Tensor]] = [[] for _ in sequences]
    for step in range(max(len(each.chunks) for each in sequences)):
        for number, logits in _packed_step(backbone, cache, sequences, tables, step):
            collected[number].append(logits)
    return [torch.stack(logits) for logits in collected]


def _packed_step(
    backbone: DecoderOnly, cache: KVCache, sequences: list[ProbeSequence], tables: list[Slots], step: int
) -> Iterator[tuple[int, Tensor]]:
    """Run the chunks of one step; yield each sequence's number and its last row's logits `[V]`."""
    active = [number for number, each in enumerate(sequences) if step < len(each.chunks)]
    active.sort(key=lambda number: sequences[number].chunks[step] > 1)
    items, embeds, positions = [], [], []
    for number in active:
        sequence, table = sequences[number], tables[number]
        begin, count = sum(sequence.chunks[:step]), sequence.chunks[step]
        start = sequence.prefix_length + begin
        items.append(PackedItem(start, count, (table[: start + count],) * len(cache.groups)))
        embeds.append(sequence.rows(backbone.embed)[begin : begin + count])
        positions.append(torch.arange(start, start + count, device=backbone.device))
    last = np.cumsum([item.num_tokens for item in items]) - 1
    metadata = backbone.plan(cache, items, last)
    yield from zip(active, backbone.forward(torch.cat(embeds), torch.cat(positions), metadata), strict=True)
