"""Encoder-decoders in packed steps give what transformers gives, alone and from token ids."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from app.errors import UnsupportedModel
from app.models.attention.kv_cache import PADDING_SLOT, KVCache
from app.models.attention.metadata import PackedItem, PackedSource
from app.models.attention.packed import register
from app.models.attention.prefixed import register_prefixed
from app.models.encoder_decoder import EncoderDecoder
from app.models.geometry import model_geometry
from app.models.positions import take_biases
from app.models.probe import TWIN_TOLERANCE, own_logits, probe_weights
from app.models.probe_sequences import ProbeSequence, ProbeSource, own_logits_of, packed_logits
from app.models.probe_sources import source_sequences
from app.prompt import PromptKind
from app.sites import SIDES, Site
from app.store.prompt_file import TaskType, make_prompt
from tests.store.builders import raw
from tests.tiny_models import SEQ2SEQ_ARCHITECTURES, VOCABULARY, packed_seq2seq, tiny_seq2seq

CPU = torch.device("cpu")
BIASED = ("t5", "t5-gated", "mt5", "umt5")


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()
    register_prefixed()


def distance(left: Tensor, right: Tensor) -> float:
    return float((left.log_softmax(-1) - right.log_softmax(-1)).abs().max())


@pytest.mark.parametrize("architecture", SEQ2SEQ_ARCHITECTURES)
def test_packed_log_probabilities_are_the_models_own(architecture: str) -> None:
    """Sources of many lengths, soft prompts in both stacks, prefixes at each site, new beside decoding."""
    own = tiny_seq2seq(architecture)
    backbone = packed_seq2seq(own)
    model_geometry(own, "own")  # the reference for prefixes looks layers up too
    with torch.inference_mode():
        sequences = source_sequences(own.config, backbone.geometry)
        expected = [own_logits_of(own, each)[each.ends] for each in sequences]
        found = packed_logits(backbone, sequences)
    assert max(map(distance, found, expected)) <= TWIN_TOLERANCE
    sites = {site for each in sequences for site in each.prefixes}
    assert sites == {Site.DECODER_SELF, Site.DECODER_CROSS} | (
        set() if architecture in BIASED else {Site.ENCODER_SELF}
    )


@pytest.mark.parametrize("architecture", SEQ2SEQ_ARCHITECTURES)
def test_packed_log_probabilities_are_those_of_generate(architecture: str) -> None:
    """The path that users take: `generate` from ids, its start token and its own cache, one at a time."""
    own = tiny_seq2seq(architecture, seed=3)
    backbone = packed_seq2seq(own)
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    sequences, expected = [], []
    for starts_at, length in enumerate((37, 2, 14, 1)):
        source = torch.from_numpy(rng.integers(3, VOCABULARY - 1, length))
        output = own.generate(
            input_ids=source[None],
            attention_mask=torch.ones(1, length, dtype=torch.long),
            max_new_tokens=24,
            do_sample=True,  # random models often repeat a token else
            pad_token_id=own.config.pad_token_id,
            output_logits=True,
            return_dict_in_generate=True,
        )
        ids = output.sequences[0, :-1]
        chunks = [1] * len(ids) if starts_at else [5, *[1] * (len(ids) - 5)]
        sequences.append(ProbeSequence(ids, chunks, source=ProbeSource(source), starts_at=starts_at))
        expected.append(torch.cat(output.logits).float()[sequences[-1].ends])
    assert len({tuple(each.ids.tolist()) for each in sequences}) == len(sequences)
    with torch.inference_mode():
        found = packed_logits(backbone, sequences)
    assert max(map(distance, found, expected)) <= TWIN_TOLERANCE


@pytest.mark.parametrize("architecture", ["t5", "bart"])
def test_the_real_weights_are_checked_too(architecture: str) -> None:
    own = own_logits(tiny_seq2seq(architecture))
    backbone = packed_seq2seq(tiny_seq2seq(architecture))
    assert probe_weights(backbone, own) < 1e-5
    with torch.no_grad():
        backbone.model.lm_head.weight.mul_(1.01)
    with pytest.raises(UnsupportedModel, match="try --dtype float32"):
        probe_weights(backbone, own)


def test_geometry_is_recorded_per_site() -> None:
    """Layers of an encoder have no number in some models; which site a module serves is seen."""
    marian, t5 = (packed_seq2seq(tiny_seq2seq(name)) for name in ("marian", "t5"))
    order = [Site.DECODER_SELF, Site.DECODER_CROSS, Site.ENCODER_SELF]
    assert [group.site for group in marian.kv_groups] == order
    for backbone in (marian, t5):
        layers = backbone.geometry.layers
        assert [len(layers[group.site]) for group in backbone.kv_groups] == [2, 2, 3]
        causal = {site: {layer.is_causal for layer in layers[site]} for site in layers}
        assert causal == {site: {site is Site.DECODER_SELF} for site in Site}
    biased = {group.site: group.geometry.has_position_bias for group in t5.kv_groups}
    assert biased == {Site.DECODER_SELF: True, Site.DECODER_CROSS: False, Site.ENCODER_SELF: True}
    assert not any(group.geometry.has_position_bias for group in marian.kv_groups)
    assert (marian.geometry.max_positions, marian.geometry.max_source_positions) == (160, 160)
    assert t5.geometry.max_source_positions == 4096, "no limit of its own"
    capped = model_geometry(tiny_seq2seq("t5"), "t5", max_context=100)
    assert (capped.max_positions, capped.max_source_positions) == (100, 100)


class Step:
    """One sequence with a source of 7 rows, step by step."""

    def __init__(self, backbone: EncoderDecoder) -> None:
        self.backbone = backbone
        self.cache = KVCache(backbone.kv_groups, [20] * 3, dtype=torch.float32, device=CPU)
        self.cross = np.arange(3, 10)

    def run(self, begin: int, *, has_source: bool) -> Tensor:
        item = PackedItem(begin, 1, (np.arange(12, 13 + begin), self.cross))
        sources = [PackedSource(7, (self.cross,))] if has_source else []
        embeds = self.backbone.embed_source(torch.arange(5, 12), follows_soft_prompt=False)
        metadata = self.backbone.plan(self.cache, [item], np.zeros(1, np.int64), sources)
        return self.backbone.forward(
            self.backbone.embed(torch.tensor([5])),
            torch.tensor([begin]),
            metadata,
            embeds if has_source else None,
        )


@pytest.mark.parametrize("architecture", ["t5", "umt5", "bart", "marian"])
def test_sources_are_projected_once(architecture: str) -> None:
    """A step without a new source runs no encoder, and of cross-attention only queries and outputs."""
    backbone = packed_seq2seq(tiny_seq2seq(architecture))
    rows: list[int] = []
    crossed = [
        module
        for module in backbone.model.modules()
        if getattr(module, "packed_layer", (None,))[0] is Site.DECODER_CROSS
    ]
    for module in (child for each in crossed for child in each.children() if isinstance(child, nn.Linear)):
        module.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[1]))
    encoded: list[Any] = []
    backbone.model.get_encoder().register_forward_hook(lambda *_: encoded.append(_))
    step = Step(backbone)
    step.run(0, has_source=True)
    assert (sorted(rows), len(encoded)) == ([1, 1, 1, 1, 7, 7, 7, 7], 1)
    rows.clear()
    step.run(1, has_source=False)
    assert (rows, len(encoded)) == ([1] * 4, 1)


def test_only_wanted_rows_reach_the_head() -> None:
    backbone = packed_seq2seq(tiny_seq2seq("bart"))
    rows: list[int] = []
    backbone.model.lm_head.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[1]))
    step = Step(backbone)
    item = PackedItem(0, 6, (np.arange(12, 18), step.cross))
    metadata = backbone.plan(step.cache, [item], np.array([1, 5]), [PackedSource(7, (step.cross,))])
    source = backbone.embed_source(torch.arange(5, 12), follows_soft_prompt=False)
    logits = backbone.forward(backbone.embed(torch.arange(6)), torch.arange(6), metadata, source)
    assert (logits.shape, rows) == ((2, VOCABULARY), [2])


def test_a_prefix_is_written_where_its_sites_have_slots() -> None:
    backbone = packed_seq2seq(tiny_seq2seq("bart"))
    lengths = {Site.DECODER_SELF: 2, Site.DECODER_CROSS: 3}
    depth = {group.site: len(group.layers) for group in backbone.kv_groups}
    tensors = {
        site.tensor(layer, side): raw((4, lengths[site], 12), seed=len(site) + 2 * layer + (side == "v"))
        for site in lengths
        for layer in range(depth[site])
        for side in SIDES
    }
    prompt = make_prompt(PromptKind.PREFIX, tensors, task_type=TaskType.SEQ_2_SEQ_LM, position_offset=0)
    cache = KVCache(backbone.kv_groups, [9] * 3, dtype=torch.float32, device=CPU)
    slots = (torch.tensor([7, 2]), torch.tensor([1, 8, 4]), torch.empty(0, dtype=torch.long))
    encoder = cache.pools((Site.ENCODER_SELF, 0))[0].zero_()
    backbone.write_prefix(prompt, cache, slots)
    for group, at in zip(backbone.kv_groups[:2], slots, strict=False):
        for layer in group.layers:
            for side, pool in zip(SIDES, cache.pools((group.site, layer)), strict=True):
                numbers = np.frombuffer(prompt.tensor_bytes(group.site.tensor(layer, side)), np.float32)
                rows = torch.from_numpy(numbers.copy()).view(4, -1, 12).transpose(0, 1).flatten(1)
                assert torch.equal(pool[at], rows)
    assert not encoder.any()


def test_sources_gather_a_prefix_that_they_share_once() -> None:
    backbone = packed_seq2seq(tiny_seq2seq("bart"))
    cache = KVCache(backbone.kv_groups, [40] * 3, dtype=torch.float32, device=CPU)
    item = PackedItem(0, 1, (np.array([1]), np.arange(1, 4)))
    shared, other = np.array([9, 4, 6]), np.array([4, 30])
    sources = [PackedSource(3, (np.arange(3),), (prefix,)) for prefix in (shared, other, shared)]
    metadata = backbone.plan(cache, [item], np.zeros(1, np.int64), sources)
    view = metadata.groups[2]
    assert view.prefix_slots is not None
    assert view.prefix_slots.tolist() == [PADDING_SLOT, 4, 6, 9, 30]
    seen = [view.prefix_slots[chunk.slots[0, :-3]].tolist() for chunk in view.layout.chunks]
    assert seen == [shared.tolist(), other.tolist(), shared.tolist()]


def test_short_sources_are_padded_with_zeros_not_with_the_prefix_of_another() -> None:
    backbone = packed_seq2seq(tiny_seq2seq("bart"))
    cache = KVCache(backbone.kv_groups, [40] * 3, dtype=torch.float32, device=CPU)
    item = PackedItem(0, 1, (np.array([1]), np.arange(1, 4)))
    sources = [PackedSource(1, (np.arange(1),), (np.array(prefix),)) for prefix in ([9, 4, 6], [30])]
    view = backbone.plan(cache, [item], np.zeros(1, np.int64), sources).groups[2]
    (rows,) = view.layout.rows
    assert view.prefix_slots is not None
    assert view.prefix_slots[rows.slots[1, 2:]].tolist() == [PADDING_SLOT] * 2


def test_biases_that_differ_beyond_the_longest_distance_are_refused() -> None:
    model: Any = tiny_seq2seq("t5")
    module = model.encoder.block[0].layer[0].SelfAttention
    own = module.compute_bias
    module.compute_bias = lambda *given, **named: own(*given, **named) + torch.arange(161.0)
    with pytest.raises(UnsupportedModel, match="beyond 20"):
        take_biases(model.encoder)
