"""Tiny random models of real architectures, with weights large enough that outputs vary."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from app.models.attention.packed import IMPLEMENTATION, register
from app.models.decoder_only import DecoderOnly
from app.models.encoder_decoder import EncoderDecoder
from app.models.geometry import model_geometry
from app.models.weights import model_class

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
_MORE_SHAPES: dict[str, dict[str, Any]] = {  # which not every test of all architectures needs
    "deepseek_v3": {  # keys are wider than values
        "intermediate_size": 64,
        "num_key_value_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "first_k_dense_replace": 9,
    },
    "gemma3_text": _GQA | {"sliding_window": WINDOW, "head_dim": 16, "query_pre_attn_scalar": 16},
}

_STACKS = {"vocab_size": VOCABULARY, "d_model": 48, "decoder_start_token_id": 2, "eos_token_id": None}
_T5 = _STACKS | {
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
}
_BART = _STACKS | {
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 160,
}
_SCALED = _BART | {"scale_embedding": True}
_GATED = {"num_heads": 4, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
# By a name of ours, where an architecture comes in several shapes: "t5-gated" is T5 1.1, and Flan.
SEQ2SEQ_SHAPES: dict[str, dict[str, Any]] = {
    "t5": _T5,
    "t5-gated": _T5 | _GATED,
    "mt5": _T5 | _GATED,
    "umt5": _T5 | _GATED,
    "bart": _BART,
    "mbart": _SCALED,
    "plbart": _BART,
    "pegasus": _SCALED,
    "marian": _SCALED | {"pad_token_id": VOCABULARY - 1},
    "blenderbot": _BART,
    "blenderbot-small": _SCALED,
    "m2m_100": _SCALED,
}
SEQ2SEQ_ARCHITECTURES = tuple(SEQ2SEQ_SHAPES)


def tiny_model(architecture: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A float32 model as its users have it, with transformers' own eager attention."""
    config = CONFIG_MAPPING[architecture](**_COMMON | (SHAPES | _MORE_SHAPES)[architecture] | overrides)
    return _random(config, seed)


def tiny_seq2seq(architecture: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """An encoder-decoder of SEQ2SEQ_SHAPES, made in the same way."""
    shape = SEQ2SEQ_SHAPES[architecture] | overrides
    return _random(CONFIG_MAPPING[architecture.removesuffix("-gated")](**shape), seed)


def _random(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).from_config(config, attn_implementation="eager", dtype=torch.float32)
        make_random(model)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def make_random(model: PreTrainedModel) -> None:
    """Give a model weights that are large enough for its outputs to vary."""
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(0.1 * torch.randn_like(parameter))
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if hasattr(module, "has_relative_attention_bias"):  # T5 scales its queries, not its scores
            module.q.weight.mul_(module.key_value_proj_dim**-0.5)


def packed_backbone(model: PreTrainedModel, fingerprint: str = "tiny") -> DecoderOnly:
    """The same weights behind our attention."""
    packed = _packed(model)
    return DecoderOnly(packed, model_geometry(packed, fingerprint))


def packed_seq2seq(model: PreTrainedModel, fingerprint: str = "tiny") -> EncoderDecoder:
    """The same weights of an encoder-decoder behind our attention."""
    packed = _packed(model)
    return EncoderDecoder(packed, model_geometry(packed, fingerprint))


def _packed(model: PreTrainedModel) -> PreTrainedModel:
    register()
    packed = copy.deepcopy(model)
    packed.set_attn_implementation(IMPLEMENTATION)
    return packed
