"""A decoder whose layers run in one call says what transformers' own layers say."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Ernie4_5Config,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    Ministral3Config,
    MistralConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from app.models.attention.kv_cache import KVCache
from app.models.attention.metadata import PackedItem
from app.models.attention.packed import IMPLEMENTATION, register
from app.models.cpu import decoder_layers, fusing, packed_linear, products
from app.models.cpu.acceleration import accelerate
from app.models.cpu.decoder_layers import FusedLayers
from app.models.cpu.mlp import MergedMLP
from app.models.cpu.packed_linear import PackedLinear, Weights
from app.models.cpu.products import product_kind, why_no_int8
from app.models.decoder_only import DecoderOnly
from app.models.geometry import model_geometry
from tests.models.cpu.conftest import Compiled
from tests.models.cpu.test_products import TILES

SIZES: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 144,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FUSED = {
    "llama": LlamaConfig(**SIZES),
    "llama with biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2, windows in one layer of two": Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=8),
}
OTHERS = {
    "granite multiplies what a layer adds": GraniteConfig(**SIZES, residual_multiplier=0.3),
    "gemma has other norms": GemmaConfig(**SIZES),
    "smollm3 has layers without positions": SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1]),
    "mixtral has experts": MixtralConfig(**SIZES, num_local_experts=2),
    "ministral3 makes late queries larger": Ministral3Config(
        **SIZES,
        sliding_window=None,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "llama_4_scaling_beta": 2.0,
            "original_max_position_embeddings": 8,
        },
    ),
    "heads of 24 aren't whole vectors": LlamaConfig(**{**SIZES, "head_dim": 24}),
}

pytestmark = pytest.mark.skipif(product_kind() is None, reason="this machine has no products of our own")


@pytest.fixture(autouse=True)
def _ours_are_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever is faster on such small shapes: the measurement has its own test."""
    monkeypatch.setattr(packed_linear, "has_onednn", lambda: False)


def backbone(config: Any) -> DecoderOnly:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
        else:
            parameter.normal_(0.0, 0.08)
    register()
    model.set_attn_implementation(IMPLEMENTATION)
    return DecoderOnly(model, model_geometry(model, "tiny"))


def logits(packed: DecoderOnly, rows: list[int] | None = None) -> torch.Tensor:
    """Two chunks of one sequence of 30 tokens beside short ones: first prefills, then mixed with decoding."""
    lengths, groups = (30, 1, 7), len(packed.kv_groups)
    slots = np.split(np.random.default_rng(0).permutation(200)[: sum(lengths)] + 1, np.cumsum(lengths)[:-1])
    cache = KVCache(packed.kv_groups, [201] * groups, dtype=packed.dtype, device=packed.device)
    found = []
    for spans in ([(2, 0, 6), (0, 0, 20)], [(1, 0, 1), (2, 6, 7), (0, 20, 30)]):
        items = [
            PackedItem(begin, end - begin, (slots[which][:end],) * groups) for which, begin, end in spans
        ]
        positions = torch.cat([torch.arange(begin, end) for _, begin, end in spans])
        ids = (positions * 37 + 11) % 128
        wanted = np.arange(len(ids)) if rows is None else np.array(rows)
        found.append(packed.forward(packed.embed(ids), positions, packed.plan(cache, items, wanted)))
    return torch.cat(found)


@pytest.mark.parametrize("name", FUSED)
def test_fused_layers_say_the_same(name: str) -> None:
    packed = backbone(FUSED[name])
    expected = logits(packed)
    accelerate(packed)
    assert isinstance(packed.model.get_submodule("model.layers.0"), FusedLayers)
    found = logits(packed)
    assert (found - expected).norm() / expected.norm() < 3e-2
    some = logits(packed, [3, 7])
    torch.testing.assert_close(some, torch.cat([found[[3, 7]], found[26:][[3, 7]]]), rtol=1e-2, atol=1e-2)


needs_int8 = pytest.mark.skipif(why_no_int8() is not None, reason="no products of integers here")


@needs_int8
@pytest.mark.parametrize("name", ["llama with biases", "qwen3"])
def test_fused_layers_of_integers_say_nearly_the_same(name: str) -> None:
    packed = backbone(FUSED[name])
    expected = logits(packed)
    accelerate(packed, "int8")
    assert isinstance(packed.model.get_submodule("model.layers.0"), FusedLayers)
    found = logits(packed)
    assert 1e-4 < (found - expected).norm() / expected.norm() < 0.1
    some = logits(packed, [3, 7])
    torch.testing.assert_close(some, torch.cat([found[[3, 7]], found[26:][[3, 7]]]), rtol=1e-2, atol=1e-2)


@needs_int8
def test_linear_layers_of_other_decoders_are_of_integers_but_not_the_head() -> None:
    packed = backbone(OTHERS["gemma has other norms"])
    expected = logits(packed)
    accelerate(packed, "int8")
    linears = {name: part for name, part in packed.model.named_modules() if isinstance(part, PackedLinear)}
    head = linears.pop("lm_head")
    assert head.packed.channels is None
    assert linears
    assert all(linear.packed.channels is not None for linear in linears.values())
    merged = [part for part in packed.model.modules() if isinstance(part, MergedMLP)]
    assert len(merged) == 3
    assert all(mlp.gate_up.channels is not None for mlp in merged)
    assert (logits(packed) - expected).norm() / expected.norm() < 0.1


@pytest.mark.parametrize("name", OTHERS)
def test_layers_of_other_kinds_stay(name: str) -> None:
    packed = backbone(OTHERS[name])
    expected = logits(packed)
    accelerate(packed)
    assert not any(isinstance(module, FusedLayers) for module in packed.model.modules())
    assert (logits(packed) - expected).norm() / expected.norm() < 3e-2


def test_one_large_token_does_not_hide_what_differs() -> None:
    packed = backbone(SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1]))
    packed.model.get_input_embeddings().weight[0] *= 1000
    assert not fusing.fuse_layers(packed)


def test_layers_with_angles_in_float32_stay() -> None:
    packed = backbone(Ernie4_5Config(**SIZES))
    expected = logits(packed)
    assert not fusing.fuse_layers(packed)
    assert torch.equal(logits(packed), expected)


def test_a_layer_that_differs_stays_with_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = backbone(FUSED["llama"])
    monkeypatch.setattr(fusing, "_TOLERANCE", 0.0)
    monkeypatch.setattr(fusing, "_ROUNDING", 0.0)
    assert not fusing.fuse_layers(packed)
    assert len(packed.model.get_submodule("model.layers")) == 3


def test_float32_stays() -> None:
    packed = backbone(FUSED["llama"])
    model = packed.model.float()
    assert not fusing.fuse_layers(DecoderOnly(model, model_geometry(model, "tiny")))


@pytest.mark.parametrize(("weights", "tolerance"), [("auto", 3e-2), ("int8", 0.1)])
def test_tiles_say_the_same(
    monkeypatch: pytest.MonkeyPatch, compiled: Compiled, weights: Weights, tolerance: float
) -> None:
    """AMX's tiles, emulated: products and attention of one step run on them."""
    library = compiled(*TILES)
    packed = backbone(FUSED["qwen3"])
    expected = logits(packed)
    monkeypatch.setattr(products, "_products", lambda: products.bound(library))
    monkeypatch.setattr(decoder_layers, "load_library", lambda: library)
    assert fusing.fuse_layers(packed, weights)
    assert (logits(packed) - expected).norm() / expected.norm() < tolerance


def test_a_token_is_the_same_whatever_stands_beside_it() -> None:
    packed = backbone(FUSED["llama"])
    accelerate(packed)
    cache = KVCache(packed.kv_groups, [101], dtype=packed.dtype, device=packed.device)
    prompt, ids = np.arange(1, 11), torch.arange(10)
    alone = PackedItem(0, 10, (prompt,))
    neighbour = PackedItem(0, 20, (np.arange(20, 40),))
    first = packed.forward(packed.embed(ids), ids, packed.plan(cache, [alone], np.array([9])))
    both, positions = torch.cat([ids, torch.arange(20) + 50]), torch.cat([ids, torch.arange(20)])
    second = packed.forward(
        packed.embed(both), positions, packed.plan(cache, [alone, neighbour], np.array([9, 29]))
    )
    assert torch.equal(first[0], second[0])
