"""Adapters that PEFT itself wrote, over tiny random models of real architectures."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    CartridgeConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

from app.prompt import LayerGeometry, ModelGeometry
from app.sites import Site
from app.store.prompt_store import PromptStore, open_store

BASES: dict[str, Any] = {
    "llama": lambda: LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=64,
        max_position_embeddings=64,
    ),
    "gpt2": lambda: GPT2Config(n_embd=24, n_layer=2, n_head=3, vocab_size=64, n_positions=64),
    # Grouped-query attention, with a head width that is not hidden_size / heads.
    "qwen2": lambda: Qwen2Config(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=64,
        max_position_embeddings=64,
    ),
}
GEOMETRIES = {
    "llama": (32, (LayerGeometry(4, 8, 8),) * 3),
    "gpt2": (24, (LayerGeometry(3, 8, 8),) * 2),
    "qwen2": (32, (LayerGeometry(2, 16, 16),) * 2),
}
KINDS: dict[str, Any] = {
    "prompt_tuning": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "p_tuning": lambda: PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8
    ),
    "prefix": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6),
    "prefix_projected": lambda: PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8
    ),
    "cartridge": lambda: CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_frozen_tokens=1),
}


@dataclass(frozen=True)
class Adapter:
    """A directory of PEFT's and what PEFT itself makes of it."""

    weights: bytes
    config: bytes
    expected: dict[str, torch.Tensor]  # by canonical name
    geometry: ModelGeometry


@pytest.fixture(scope="session", params=[f"{base}-{kind}" for base in BASES for kind in KINDS])
def adapter(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    base, kind = request.param.split("-")
    return save_adapter(base, kind, tmp_path_factory.mktemp("adapter"), torch.float32)


@pytest.fixture(scope="session", params=[torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def half_adapter(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    return save_adapter("qwen2", "prefix", tmp_path_factory.mktemp("adapter"), request.param)


def save_adapter(base: str, kind: str, directory: Path, dtype: torch.dtype) -> Adapter:
    torch.manual_seed(len(base) * len(kind))
    model = AutoModelForCausalLM.from_config(BASES[base]()).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, KINDS[kind](), autocast_adapter_dtype=False).eval()
        adapted.prompt_encoder.to(dtype)
        adapted.save_pretrained(directory)
    hidden, layers = GEOMETRIES[base]
    return Adapter(
        (directory / "adapter_model.safetensors").read_bytes(),
        (directory / "adapter_config.json").read_bytes(),
        _expected(adapted, len(layers)),
        ModelGeometry(
            architecture=base,
            hidden_size=hidden,
            vocab_size=64,
            max_positions=64,
            layers={Site.DECODER_SELF: layers},
            dtype=str(dtype).removeprefix("torch."),
            fingerprint="0" * 64,
        ),
    )


def _expected(adapted: PeftModel, num_layers: int) -> dict[str, torch.Tensor]:
    """What PEFT feeds the model: embeddings, or the cache."""
    with torch.no_grad():
        prompt = adapted.get_prompt(batch_size=1)
    if isinstance(prompt, torch.Tensor):
        return {"dec.embeds": prompt[0]}
    assert len(prompt.layers) == num_layers
    return {
        f"dec.self.{index}.{side}": tensor[0]
        for index, layer in enumerate(prompt.layers)
        for side, tensor in (("k", layer.keys), ("v", layer.values))
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(root: Path) -> PromptStore:
    return open_store(root)
