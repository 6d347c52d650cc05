"""What the probes of encoder-decoders run: sources of every kind, beside rows that decode already."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from app.models.probe_sequences import Prefix, ProbeSequence, ProbeSource, eager_logits
from app.models.twin import TWIN_DISTANCE, TWIN_VOCABULARY
from app.prompt import LayerGeometry, ModelGeometry
from app.sites import Site

_PREFIX_LENGTH = 5
_SOFT_LENGTH = 6
_FAR = [1] * (TWIN_DISTANCE + 6)  # rows past the longest distance that T5 tells apart


def source_ids(config: PreTrainedConfig, number: int) -> Tensor:
    """Return random ids. Padding is no input: some models give what follows it other positions."""
    ids = torch.randint(0, TWIN_VOCABULARY, (number,))
    return torch.where(ids == config.pad_token_id, (ids + 1) % TWIN_VOCABULARY, ids)


def source_sequences(config: PreTrainedConfig, geometry: ModelGeometry) -> list[ProbeSequence]:
    """Return sequences with sources for a twin: short ones beside long ones, which begin in different steps.

    Soft prompts stand in the encoder and in the decoder. The prefixed ones come last.
    """

    def sequence(
        source: int, chunks: list[int], *, starts_at: int = 0, encoder: int = 0, decoder: int = 0
    ) -> ProbeSequence:
        soft = [
            torch.randn(rows, geometry.hidden_size) * 0.5 if rows else None for rows in (encoder, decoder)
        ]
        ids = source_ids(config, sum(chunks) - decoder)
        return ProbeSequence(
            ids,
            chunks,
            soft[1],
            source=ProbeSource(source_ids(config, source), soft[0]),
            starts_at=starts_at,
        )

    sequences = [
        sequence(2 * TWIN_DISTANCE + 13, [1, 7, *_FAR]),
        sequence(3, [1] * 9),
        sequence(1, [4, 1, 1], starts_at=2),
        sequence(11, [1] * 5, starts_at=1, encoder=_SOFT_LENGTH),
        sequence(9, [_SOFT_LENGTH + 1, 1, 1], starts_at=3, decoder=_SOFT_LENGTH),
    ]
    if geometry.takes_prefixes:
        sequences += _prefixed(sequence, geometry)
    return sequences


def _prefixed(sequence: Callable[..., ProbeSequence], geometry: ModelGeometry) -> list[ProbeSequence]:
    """Return a sequence with a prefix as PEFT trains it, and one with a prefix at every site that has them.

    Scores that get a bias by distance have none for keys before the first token, where positions are not
    shifted, and before an encoder's tokens.
    """
    is_biased = any(layer.has_position_bias for layers in geometry.layers.values() for layer in layers)
    sites = (Site.DECODER_SELF, Site.DECODER_CROSS) if is_biased else tuple(geometry.layers)
    trained, everywhere = (sequence(20, [2, *_FAR], starts_at=2), sequence(17, [3, *[1] * 9], starts_at=4))
    return [
        _with_prefixes(trained, geometry, (Site.DECODER_SELF,), is_shifted=True),
        _with_prefixes(everywhere, geometry, sites, is_shifted=is_biased),
    ]


def _with_prefixes(
    bare: ProbeSequence, geometry: ModelGeometry, sites: tuple[Site, ...], *, is_shifted: bool
) -> ProbeSequence:
    prefixes = {
        # A length of its own at each site, so that none stands for another.
        site: random_prefix(geometry.layers[site], _PREFIX_LENGTH + place)
        for place, site in enumerate(sites)
    }
    return ProbeSequence(
        bare.ids,
        bare.chunks,
        prefixes=prefixes,
        is_shifted=is_shifted,
        source=bare.source,
        starts_at=bare.starts_at,
    )


def random_prefix(layers: tuple[LayerGeometry, ...], length: int = _PREFIX_LENGTH) -> Prefix:
    """Return random keys and values of `length` slots for each layer of a site."""
    return [
        (
            torch.randn(1, layer.num_kv_heads, length, layer.key_dim),
            torch.randn(1, layer.num_kv_heads, length, layer.value_dim),
        )
        for layer in layers
    ]


def one_by_one_from_source(twin: PreTrainedModel, source: Tensor, row: Tensor) -> Tensor:
    """Return logits `[n, V]` of `row [1, n]` as generation computes them, with the model's own cache."""
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    logits = [
        eager_logits(
            twin, input_ids=source, decoder_input_ids=ids[None], past_key_values=cache, use_cache=True
        )
        for ids in row.T
    ]
    return torch.cat(logits)
