"""Tiny random models of real architectures, with weights large enough that outputs vary."""

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from app.models.attention.packed import IMPLEMENTATION, register
from app.models.decoder_only import DecoderOnly
from app.models.geometry import model_geometry

VOCABULARY = 211
WINDOW = 16
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 320,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_GQA = {"intermediate_size": 64, "num_key_value_heads": 2}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": _GQA,
    "gpt2": {},
    "qwen2": _GQA,
    "mistral": _GQA | {"sliding_window": WINDOW, "head_dim": 12},
    "gemma2": _GQA | {"sliding_window": WINDOW, "head_dim": 16, "query_pre_attn_scalar": 16},
    "gpt_neox": {"intermediate_size": 64},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 48},
    "gpt_oss": _GQA
    | {"sliding_window": WINDOW, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mixtral": _GQA | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
}
ARCHITECTURES = tuple(SHAPES)


def tiny_model(architecture: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A float32 model as its users have it, with transformers' own eager attention."""
    config = CONFIG_MAPPING[architecture](**_COMMON | SHAPES[architecture] | overrides)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def packed_backbone(model: PreTrainedModel, fingerprint: str = "tiny") -> DecoderOnly:
    """The same weights behind our attention."""
    register()
    config = copy.deepcopy(model.config)
    packed = AutoModelForCausalLM.from_config(config, attn_implementation=IMPLEMENTATION, dtype=torch.float32)
    packed.load_state_dict(model.state_dict())
    packed.eval().requires_grad_(False)
    return DecoderOnly(packed, model_geometry(packed, fingerprint))
