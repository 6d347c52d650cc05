"""The probe of encoder-decoders passes what is exact, refuses the rest by name, and notices mistakes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from app.errors import UnsupportedModel
from app.models import geometry
from app.models.attention import metadata, packed, position_bias
from app.models.attention.backend import Context
from app.models.attention.packed import register
from app.models.encoder_decoder import EncoderDecoder
from app.models.positions import PackedPositions
from app.models.probe import TWIN_TOLERANCE, probe_architecture
from app.models.twin import twin_config

# With their default shapes, as big as their first releases, and T5 1.1's, whose heads are wider together
# than its embeddings.
WIDE = {"feed_forward_proj": "gated-gelu", "num_heads": 6, "tie_word_embeddings": False}
EXACT: dict[str, dict[str, Any]] = {
    "t5": {},
    "t5-gated": WIDE,
    "mt5": {},
    "umt5": {},
    "bart": {},
    "mbart": {"scale_embedding": True},
    "plbart": {},
    "pegasus": {"scale_embedding": True},
    "marian": {"scale_embedding": True},
    "blenderbot": {},
    "blenderbot-small": {"scale_embedding": True},
    "m2m_100": {},
}


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()


def config(name: str) -> Any:
    return CONFIG_MAPPING[name.removesuffix("-gated")](**EXACT[name])


@pytest.mark.parametrize("name", EXACT)
def test_supported_architectures_pass(name: str) -> None:
    assert probe_architecture(config(name)) <= TWIN_TOLERANCE


@pytest.mark.parametrize("name", ["bart", "pegasus", "marian"])
def test_embeddings_need_not_be_tied(name: str) -> None:
    """Real tokens after a soft prompt get the model's embeddings, which an encoder has a copy of at most."""
    assert probe_architecture(CONFIG_MAPPING[name](tie_word_embeddings=False)) <= TWIN_TOLERANCE


REFUSED = {
    "mvp": "sends 0 of its",
    "led": "sends 0 of its",
    "bigbird_pegasus": "sends 0 of its",
    "pegasus_x": "sends 0 of its",
    "longt5": "doesn't get the arguments",
    "fsmt": "through transformers' attention interface fails",
    "prophetnet": "no small twin of it runs",
    "switch_transformers": "a request would change its neighbours",
    "nllb-moe": "a request would change its neighbours",
    "t5gemma": "doesn't say how many layers its encoder and decoder have",
}


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedModel, match=REFUSED[name]) as refusal:
        probe_architecture(CONFIG_MAPPING[name]())
    assert f"the architecture '{name}'" in refusal.value.message
    assert "\n" not in refusal.value.message


def test_the_twin_keeps_what_makes_an_encoder_decoder_differ() -> None:
    t5, wide, marian = (twin_config(config(name)) for name in ("t5", "t5-gated", "marian"))
    assert t5.d_model == t5.num_heads * t5.d_kv
    assert wide.d_model != wide.num_heads * wide.d_kv
    assert wide.is_gated_act
    assert (t5.num_layers, t5.num_decoder_layers) == (3, 2)
    assert (marian.encoder_layers, marian.decoder_layers) == (3, 2)
    assert t5.relative_attention_max_distance < 61, "sources and rows go beyond it"


Patch = Callable[[pytest.MonkeyPatch], None]


def cross_slots_of_another(patch: pytest.MonkeyPatch) -> None:
    own = metadata._Step._of_cross

    def rotated(self: Any, number: int, *given: Any) -> Any:
        slots = [item.slots[number] for item in self.items]
        items = [
            metadata.PackedItem(item.num_computed, item.num_tokens, (*item.slots[:number], other))
            for item, other in zip(self.items, slots[1:] + slots[:1], strict=True)
        ]
        return own(metadata._Step(items, self.sources, self.groups, self.device), number, *given)

    patch.setattr(metadata._Step, "_of_cross", rotated)


def no_cross_prefix(patch: pytest.MonkeyPatch) -> None:
    """The prefix of the last sequence: 6 slots before a source of 17 rows."""
    own = metadata.Context

    def cut(num_tokens: int, slots: Any, has_own: bool = True, heads: Any = ()) -> Context:
        return own(num_tokens, slots if has_own or len(slots) != 6 + 17 else slots[6:], has_own, heads)

    patch.setattr(metadata, "Context", cut)


def a_table_without_clamp(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        position_bias,
        "_columns",
        lambda table, distances: (distances + table.shape[1] // 2).remainder(table.shape[1]),
    )


def biases_by_token(patch: pytest.MonkeyPatch) -> None:
    """Distances in the packed row of tokens, not among a sequence's slots."""
    own = position_bias.RowDistances.of
    patch.setattr(
        position_bias.RowDistances, "of", lambda lengths, context: own(torch.full_like(lengths, 1), context)
    )


def scaled_soft_prompts(patch: pytest.MonkeyPatch) -> None:
    own = EncoderDecoder.embed_source
    patch.setattr(
        EncoderDecoder,
        "embed_source",
        lambda self, ids, *, follows_soft_prompt: own(self, ids, follows_soft_prompt=False),
    )


def unscaled_sources(patch: pytest.MonkeyPatch) -> None:
    own = EncoderDecoder.embed_source
    patch.setattr(
        EncoderDecoder,
        "embed_source",
        lambda self, ids, *, follows_soft_prompt: own(self, ids, follows_soft_prompt=True),
    )


def positions_by_row(patch: pytest.MonkeyPatch) -> None:
    def counted(self: Any, *_: Any, **__: Any) -> Tensor:
        return functional.embedding(torch.arange(len(self._positions)), self.weight).unsqueeze(0)

    patch.setattr(PackedPositions, "forward", counted)


def a_causal_encoder(patch: pytest.MonkeyPatch) -> None:
    own = geometry.LayerGeometry
    patch.setattr(geometry, "LayerGeometry", lambda **given: own(**given | {"is_causal": True}))


def no_encoder_prefix(patch: pytest.MonkeyPatch) -> None:
    own = packed._pools_of_step
    patch.setattr(
        packed,
        "_pools_of_step",
        lambda cache, layer, group, keys, values: tuple(
            pool.index_fill(0, torch.arange(len(pool) - keys.shape[1]), 0.0)
            for pool in own(cache, layer, group, keys, values)
        ),
    )


MISTAKES: list[tuple[str, Patch]] = [
    ("t5", cross_slots_of_another),
    ("bart", cross_slots_of_another),
    ("bart", no_cross_prefix),
    ("t5", no_cross_prefix),
    ("t5", a_table_without_clamp),
    ("umt5", a_table_without_clamp),
    ("t5", biases_by_token),
    ("pegasus", scaled_soft_prompts),
    ("marian", scaled_soft_prompts),
    ("pegasus", unscaled_sources),
    ("bart", positions_by_row),
    ("m2m_100", positions_by_row),
    ("t5", a_causal_encoder),
    ("mbart", a_causal_encoder),
    ("bart", no_encoder_prefix),
]


@pytest.mark.parametrize(("name", "mistake"), MISTAKES, ids=lambda value: getattr(value, "__name__", value))
def test_a_mistake_is_noticed(name: str, mistake: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    mistake(monkeypatch)
    with pytest.raises(UnsupportedModel, match=f"'{name}' differs .* \\(tolerance 1e-04\\)"):
        probe_architecture(config(name))
