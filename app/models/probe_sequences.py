"""Short sequences for the probes: their logits by the model's own attention alone, and packed.

n token ids, p rows of a soft prompt, d embedding width, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from app.models.attention.kv_cache import KVCache, Slots
from app.models.attention.metadata import PackedItem, PackedSource
from app.models.attention.packed import IMPLEMENTATION
from app.models.attention.prefixed import PREFIXED
from app.models.backbones import AnyBackbone
from app.models.own_tensors import embedding_after_prompts
from app.sites import Site

Prefix = Sequence[tuple[Tensor, Tensor]]  # per layer, K and V [1, Hk, slots, D]


@dataclass(frozen=True, eq=False)
class ProbeSource:
    """What an encoder reads: rows of a soft prompt if there are some, then token ids."""

    ids: Tensor  # [n]
    soft: Tensor | None = None  # [p, d]

    @property
    def num_rows(self) -> int:
        """Rows of the soft prompt, and tokens."""
        return len(self.ids) + (0 if self.soft is None else len(self.soft))


@dataclass(frozen=True, eq=False)
class ProbeSequence:
    """Teacher-forced tokens: rows of a soft prompt if there are some, then token ids."""

    ids: Tensor  # [n]
    chunks: list[int]  # how many rows each step takes
    soft: Tensor | None = None  # [p, d]
    prefixes: Mapping[Site, Prefix] = field(default_factory=dict)
    is_shifted: bool = True  # False: positions don't count the prefix
    source: ProbeSource | None = None  # for an encoder
    starts_at: int = 0  # the step of the first chunk

    def prefix_length(self, site: Site) -> int:
        """Return the slots of the prefix at a site."""
        return self.prefixes[site][0][0].shape[2] if site in self.prefixes else 0

    @property
    def ends(self) -> NDArray[np.int64]:
        """The last row of each chunk."""
        return np.cumsum(self.chunks) - 1

    def num_slots(self, site: Site) -> int:
        """Return the slots that it takes at a site in the end."""
        own = {Site.DECODER_SELF: sum(self.chunks)}
        if self.source is not None:
            own[Site.DECODER_CROSS] = self.source.num_rows
        return self.prefix_length(site) + own.get(site, 0)


def _with_soft(soft: Tensor | None, embeds: Tensor) -> Tensor:
    return embeds if soft is None else torch.cat([soft, embeds])


def eager_logits(model: PreTrainedModel, attention: str = "eager", **inputs: Any) -> Tensor:
    """Return logits `[n, V]` of the only row of `inputs`, by the model's own attention."""
    model.set_attn_implementation(attention)
    try:
        logits: Tensor = model(**inputs).logits[0].float()
    finally:
        model.set_attn_implementation(IMPLEMENTATION)
    return logits


def own_logits_of(model: PreTrainedModel, sequence: ProbeSequence) -> Tensor:
    """Return logits `[p + n, V]` of all rows by the model's own attention, alone, in one pass."""
    if sequence.source is not None:
        return _own_logits_from_source(model, sequence, sequence.source)
    cache = _filled(sequence, Site.DECODER_SELF, DynamicCache(config=model.config))
    ones = _ones(sequence, model)
    common: dict[str, Any] = {
        "attention_mask": ones,
        "past_key_values": cache,
        "use_cache": cache is not None,
    }
    if sequence.soft is None:
        return eager_logits(model, input_ids=sequence.ids.unsqueeze(0), **common)
    embeds = _with_soft(sequence.soft, model.get_input_embeddings()(sequence.ids))
    return eager_logits(model, inputs_embeds=embeds.unsqueeze(0), **common)


def _own_logits_from_source(model: PreTrainedModel, sequence: ProbeSequence, source: ProbeSource) -> Tensor:
    """As its users run it: from ids; soft prompts stand before what PEFT makes of ids."""
    inputs: dict[str, Any] = {"input_ids": source.ids[None], "decoder_input_ids": sequence.ids[None]}
    if source.soft is not None:
        embeds = _with_soft(source.soft, embedding_after_prompts(model)(source.ids))
        inputs |= {"input_ids": None, "inputs_embeds": embeds[None]}
    if sequence.soft is not None:
        embeds = _with_soft(sequence.soft, model.get_decoder().get_input_embeddings()(sequence.ids))
        inputs |= {"decoder_input_ids": None, "decoder_inputs_embeds": embeds[None]}
    if not sequence.prefixes:
        return eager_logits(model, **inputs, use_cache=False)
    if not sequence.is_shifted:  # no cache of transformers has such a prefix
        return eager_logits(model, PREFIXED, **inputs, use_cache=False, prefixes=sequence.prefixes)
    own = _filled(sequence, Site.DECODER_SELF, DynamicCache()) or DynamicCache()
    cache = EncoderDecoderCache(own, _filled(sequence, Site.DECODER_CROSS, DynamicCache()) or DynamicCache())
    cache.is_updated = {}  # the source is still to come
    mask = _ones(sequence, model)
    return eager_logits(model, **inputs, decoder_attention_mask=mask, past_key_values=cache, use_cache=True)


def _ones(sequence: ProbeSequence, model: PreTrainedModel) -> Tensor:
    return torch.ones(1, sequence.num_slots(Site.DECODER_SELF), dtype=torch.long, device=model.device)


def _filled(sequence: ProbeSequence, site: Site, cache: DynamicCache) -> DynamicCache | None:
    """Put a prefix into a cache of transformers; return None where there is none."""
    for layer, (keys, values) in enumerate(sequence.prefixes.get(site, ())):
        cache.update(keys, values, layer)
    return cache if site in sequence.prefixes else None


class _PackedRun:
    """Sequences that share steps, each with slots of its own."""

    def __init__(self, backbone: AnyBackbone, sequences: Sequence[ProbeSequence]) -> None:
        self._backbone = backbone
        self._sequences = sequences
        self._length = max(each.num_slots(site) for each in sequences for site in Site)
        num_slots = [1 + self._length * len(sequences)] * len(backbone.kv_groups)
        self._cache = KVCache(backbone.kv_groups, num_slots, dtype=backbone.dtype, device=backbone.device)
        for group in backbone.kv_groups:
            for layer in group.layers:
                for pool in self._cache.pools((group.site, layer)):
                    pool[1:].fill_(float("nan"))  # what is read without being written shows
        for number, sequence in enumerate(sequences):
            for site, layers in sequence.prefixes.items():
                slots = torch.from_numpy(self._table(number, site, sequence.prefix_length(site)))
                for layer, kv in enumerate(layers):
                    self._cache.write((site, layer), slots, *(rows[0].transpose(0, 1) for rows in kv))

    def _table(self, number: int, site: Site, length: int) -> Slots:
        """Return a sequence's slots; interleaved on purpose: identity tables would hide a wrong slot."""
        first = (number + list(Site).index(site)) % len(self._sequences)
        return np.arange(length) * len(self._sequences) + 1 + first

    def _per_group(self, site: Site, slots: Slots) -> tuple[Slots, ...]:
        return (slots,) * sum(group.site is site for group in self._backbone.kv_groups)

    def _item(self, number: int, begin: int, count: int) -> PackedItem:
        sequence = self._sequences[number]
        start = sequence.prefix_length(Site.DECODER_SELF) + begin
        own = self._table(number, Site.DECODER_SELF, start + count)
        cross = self._table(number, Site.DECODER_CROSS, sequence.num_slots(Site.DECODER_CROSS))
        slots = self._per_group(Site.DECODER_SELF, own) + self._per_group(Site.DECODER_CROSS, cross)
        return PackedItem(start, count, slots)

    def _source(self, number: int, source: ProbeSource) -> PackedSource:
        sequence = self._sequences[number]
        cross = self._table(number, Site.DECODER_CROSS, sequence.num_slots(Site.DECODER_CROSS))
        own = cross[sequence.prefix_length(Site.DECODER_CROSS) :]
        before = self._table(number, Site.ENCODER_SELF, sequence.prefix_length(Site.ENCODER_SELF))
        return PackedSource(
            source.num_rows,
            self._per_group(Site.DECODER_CROSS, own),
            self._per_group(Site.ENCODER_SELF, before) if len(before) else (),
        )

    def _source_embeds(self, source: ProbeSource) -> Tensor:
        has_soft = source.soft is not None
        return _with_soft(source.soft, self._backbone.embed_source(source.ids, follows_soft_prompt=has_soft))

    def step(self, step: int) -> Iterator[tuple[int, Tensor]]:
        """Run the chunks of one step; yield each sequence's number and its last row's logits `[V]`."""
        active = [
            n for n, each in enumerate(self._sequences) if 0 <= step - each.starts_at < len(each.chunks)
        ]
        active.sort(key=lambda n: self._sequences[n].chunks[step - self._sequences[n].starts_at] > 1)
        items, embeds, positions, sources, source_embeds = [], [], [], [], []
        for number in active:
            sequence = self._sequences[number]
            place = step - sequence.starts_at
            begin, count = sum(sequence.chunks[:place]), sequence.chunks[place]
            items.append(self._item(number, begin, count))
            embeds.append(_with_soft(sequence.soft, self._backbone.embed(sequence.ids))[begin:][:count])
            first = items[-1].num_computed if sequence.is_shifted else begin
            positions.append(torch.arange(first, first + count, device=self._backbone.device))
            if place == 0 and sequence.source is not None:
                sources.append(self._source(number, sequence.source))
                source_embeds.append(self._source_embeds(sequence.source))
        last = np.cumsum([item.num_tokens for item in items]) - 1
        metadata = self._backbone.plan(self._cache, items, last, sources)
        encoded = torch.cat(source_embeds) if sources else None
        logits = self._backbone.forward(torch.cat(embeds), torch.cat(positions), metadata, encoded)
        yield from zip(active, logits.float(), strict=True)


def packed_logits(backbone: AnyBackbone, sequences: Sequence[ProbeSequence]) -> list[Tensor]:
    """Return logits `[chunks, V]` at the ends of each sequence's chunks; all sequences share steps."""
    run = _PackedRun(backbone, sequences)
    collected: list[list[Tensor]] = [[] for _ in sequences]
    for step in range(max(each.starts_at + len(each.chunks) for each in sequences)):
        for number, logits in run.step(step):
            collected[number].append(logits)
    return [torch.stack(logits) for logits in collected]
