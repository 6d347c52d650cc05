"""Faster modules say what the ones they replace say; what they can't replace stays."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    GemmaConfig,
    LlamaConfig,
    MixtralConfig,
    PhiConfig,
    T5Config,
)

from app.models.attention import registry
from app.models.attention.cpu import CPUBackend
from app.models.attention.kv_cache import KVCache
from app.models.attention.metadata import PackedItem, PackedSource
from app.models.attention.packed import IMPLEMENTATION, register
from app.models.attention.torch import TorchBackend
from app.models.cpu.acceleration import accelerate_modules
from app.models.cpu.building import NotBuilt
from app.models.cpu.library import load_kernels
from app.models.cpu.mlp import GatedMLP, MergedMLP, PlainMLP
from app.models.cpu.packed_linear import PackedLinear, packers
from app.models.cpu.rms_norm import RMSNorm
from app.models.cpu.sampled_rows import OnlySampled
from app.models.decoder_only import DecoderOnly
from app.models.encoder_decoder import EncoderDecoder
from app.models.geometry import model_geometry
from app.models.probe import own_logits, probe_weights
from tests.tiny_models import packed_backbone, tiny_model

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "head_dim": 16,
}


def bf16_model(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval().requires_grad_(False)


def backbone_of(model: Any) -> DecoderOnly:
    register()
    implementation = model.config._attn_implementation
    model.set_attn_implementation(IMPLEMENTATION)
    backbone = DecoderOnly(model, model_geometry(model, "tiny"))
    model.set_attn_implementation(implementation)
    return backbone


def accelerate_and_compare(model: Any, length: int) -> None:
    """The logits stay what they were, up to bf16's rounding."""
    ids = torch.randint(0, 128, (1, length))
    with torch.inference_mode():
        before = model(ids).logits
        accelerate_modules(model)
        torch.testing.assert_close(model(ids).logits, before, rtol=5e-2, atol=5e-2)


def count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


def has_kernels() -> bool:
    try:
        load_kernels()
    except NotBuilt:
        return False
    return True


@pytest.mark.parametrize("length", [1, 7, 1100])
def test_a_llama_says_the_same(length: int) -> None:
    model = bf16_model(LlamaConfig(**SIZES, max_position_embeddings=2048))
    accelerate_and_compare(model, length)
    if any(packers()):
        gated, merged = count(model, GatedMLP), count(model, MergedMLP)
        # A merged MLP has its gate and up in one, which is no layer.
        assert (gated + merged, count(model, PackedLinear)) == (2, 2 * 7 + 1 - 2 * merged)
    if has_kernels():
        assert count(model, RMSNorm) == 5


T5_SIZES = {"d_model": 64, "d_kv": 32, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 128}
BART_SIZES = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "vocab_size": 128,
    "init_std": 0.25,
}
SEQ2SEQ = {  # the configuration; how many linear layers, MLPs of each kind and norms there are to replace
    "t5": (T5Config(**T5_SIZES), 33, 4, 0, 12),
    "t5 gated": (T5Config(**T5_SIZES, feed_forward_proj="gated-gelu"), 37, 0, 4, 12),
    "t5 gated by silu": (T5Config(**T5_SIZES, feed_forward_proj="gated-silu"), 37, 0, 4, 12),
    "bart": (BartConfig(**BART_SIZES), 33, 0, 0, 0),
}


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_an_encoder_decoder_says_the_same(name: str) -> None:
    config, *numbers = SEQ2SEQ[name]
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(config).to(torch.bfloat16).eval().requires_grad_(False)
    given = {"input_ids": torch.randint(3, 128, (1, 600)), "decoder_input_ids": torch.randint(3, 128, (1, 9))}
    with torch.inference_mode():
        before = model(**given).logits
        accelerate_modules(model)
        after = model(**given).logits
    assert (after - before).norm() / before.norm() < 5e-2
    if any(packers()):
        merged = count(model, MergedMLP)
        found = [count(model, kind) for kind in (PackedLinear, PlainMLP, GatedMLP)]
        assert [found[0] + 2 * merged, found[1], found[2] + merged] == numbers[:3]
    if has_kernels():
        assert count(model, RMSNorm) == numbers[3]
    assert count(model, OnlySampled) == 0


def test_other_norms_stay() -> None:
    """Gemma multiplies by 1 + weight; its MLP has another activation, which is kept."""
    model = bf16_model(GemmaConfig(**SIZES))
    model.model.layers[0].input_layernorm.weight.data.fill_(0.5)
    accelerate_and_compare(model, length=5)
    assert count(model, RMSNorm) == 0


@pytest.mark.parametrize(
    "config",
    [MixtralConfig(**SIZES, num_local_experts=2), PhiConfig(**SIZES)],
    ids=["mixtral", "phi"],
)
def test_mlps_of_other_kinds_stay(config: Any) -> None:
    model = bf16_model(config)
    accelerate_and_compare(model, length=5)
    assert count(model, GatedMLP) + count(model, MergedMLP) == 0


def test_float32_is_left_alone() -> None:
    model = bf16_model(LlamaConfig(**SIZES)).float()
    modules = [type(module) for module in model.modules()]
    accelerate_modules(model)
    assert [type(module) for module in model.modules()] == modules


@pytest.mark.parametrize("with_kernels", [True, False])
@pytest.mark.parametrize(
    ("architecture", "shape"), [("qwen2", {"head_dim": 16}), ("mistral", {"head_dim": 16}), ("gpt2", {})]
)
def test_packed_attention_in_bf16_passes_the_probe_either_way(
    architecture: str, shape: dict[str, Any], with_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gpt2's heads of 12 don't fit the kernels: torch's attend then, as where there is no compiler."""
    if not with_kernels:
        monkeypatch.setattr(registry, "BACKENDS", (TorchBackend,))
    model: Any = packed_backbone(tiny_model(architecture, **shape)).model
    model.to(torch.bfloat16)
    backbone = backbone_of(model)
    model.set_attn_implementation(IMPLEMENTATION)
    own = own_logits(model)
    accelerate_modules(backbone.model)
    assert probe_weights(backbone, own) < 8e-2


def test_the_last_mlp_computes_what_is_sampled_and_nothing_else() -> None:
    if not any(packers()):
        pytest.skip("this torch has no packed products, so no MLP is fused")
    model = bf16_model(LlamaConfig(**SIZES))
    backbone = backbone_of(model)
    model.set_attn_implementation(IMPLEMENTATION)
    accelerate_modules(model)
    last = model.model.layers[1].mlp
    assert [isinstance(layer.mlp, OnlySampled) for layer in model.model.layers] == [False, True]
    computed: list[int] = []
    last._module.register_forward_pre_hook(lambda _, inputs: computed.append(inputs[0].shape[1]))
    everything = packed_logits(backbone, 6, [0, 1, 2, 3, 4, 5])
    sampled = packed_logits(backbone, 6, [1, 5])
    torch.testing.assert_close(sampled, everything[[1, 5]], rtol=1e-2, atol=1e-2)
    assert computed == [6, 2]


def packed_logits(backbone: DecoderOnly, num_tokens: int, rows: list[int]) -> torch.Tensor:
    cache = KVCache(backbone.kv_groups, [1 + num_tokens], dtype=backbone.dtype, device=torch.device("cpu"))
    item = PackedItem(0, num_tokens, (np.arange(1, 1 + num_tokens),))
    metadata = backbone.plan(cache, [item], np.array(rows))
    ids = torch.arange(num_tokens)
    return backbone.forward(backbone.embed(ids), ids, metadata)


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_a_packed_encoder_decoder_says_the_same(name: str) -> None:
    """Two sources of different lengths in one step, then a step without a new one."""
    torch.manual_seed(0)
    model: Any = AutoModelForSeq2SeqLM.from_config(SEQ2SEQ[name][0]).to(torch.bfloat16).eval()
    sources = [torch.randint(3, 128, (number,)) for number in (300, 9)]
    ids = torch.randint(3, 128, (2, 3))
    with torch.inference_mode():
        own = [
            model(input_ids=source[None], decoder_input_ids=row[None]).logits[0, 1:].float()
            for source, row in zip(sources, ids, strict=True)
        ]
    register()
    model.set_attn_implementation(IMPLEMENTATION)
    backbone = EncoderDecoder(model, model_geometry(model, "tiny"))
    accelerate_modules(model)
    if has_kernels():
        assert {type(backend) for backend in backbone.backends} == {CPUBackend}
    found = packed_decoding(backbone, sources, ids)
    assert (found - torch.stack(own)).norm() / torch.stack(own).norm() < 8e-2


def packed_decoding(backbone: EncoderDecoder, sources: list[torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Return logits `[sequences, 2, V]` of two steps: after two tokens with their sources, and one more."""
    slots = torch.randperm(400).add(1).numpy()
    own = [slots[:3], slots[3:6]]
    cross = np.split(slots[6:], np.cumsum([len(source) for source in sources]))[:-1]
    cache = KVCache(
        backbone.kv_groups, [401] * len(backbone.kv_groups), dtype=backbone.dtype, device=torch.device("cpu")
    )
    packed = [PackedSource(len(ids), (to,)) for ids, to in zip(sources, cross, strict=True)]
    embeds = backbone.embed_source(torch.cat(sources), follows_soft_prompt=False)
    found = []
    for begin, end in ((0, 2), (2, 3)):
        items = [
            PackedItem(begin, end - begin, (mine[:end], read)) for mine, read in zip(own, cross, strict=True)
        ]
        last = np.arange(1, 3) * (end - begin) - 1
        metadata = backbone.plan(cache, items, last, [] if begin else packed)
        tokens, positions = ids[:, begin:end].flatten(), torch.arange(begin, end).repeat(2)
        step = backbone.embed(tokens), positions, metadata
        found.append(backbone.forward(*step, None if begin else embeds))
    return torch.stack(found, dim=1)
