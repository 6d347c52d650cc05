"""A tiny float32 twin of an architecture: few layers, random weights, a small window.

What may make a base differ from a plain decoder stays: kinds of layers, head widths, rotary settings,
shared keys and values, special token ids, scales. Only sizes and counts become smaller.
"""

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from app.models.attention.packed import IMPLEMENTATION
from app.models.geometry import stack_depths
from app.models.weights import model_class

TWIN_VOCABULARY = 128
TWIN_WINDOW = 8
TWIN_DISTANCE = 24  # beyond which biases by distance are all the same
_TWIN_POSITIONS = 128  # of an encoder-decoder; the probes' sequences are shorter

# At most this, where the field is a number.
_BOUNDS = {
    "vocab_size": TWIN_VOCABULARY,
    "vocab_size_per_layer_input": TWIN_VOCABULARY,
    "decoder_vocab_size": TWIN_VOCABULARY,
    "d_ff": 96,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "relative_attention_num_buckets": 16,
    "relative_attention_max_distance": TWIN_DISTANCE,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "n_inner": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "sliding_window": TWIN_WINDOW,
    "attention_chunk_size": TWIN_WINDOW,
    "floor_scale": TWIN_WINDOW,  # positions from which Llama 4 scales its queries
}
_KINDS_AT_MOST = 8  # of layers, in one list; more are numbers of each layer, not kinds


def twin_config(config: PreTrainedConfig, *, narrow: bool = True) -> PreTrainedConfig:
    """Return the same architecture made small. Head widths stay, since rotary tables depend on them.

    Not `narrow`: numbers of heads and the hidden width stay too, which some architectures tie to others.
    """
    small = copy.deepcopy(config)
    text = small.get_text_config()
    _cut_layers(text)
    if narrow:
        _narrow(text)
    if config.is_encoder_decoder:
        _shape_stacks(config, small, narrow=narrow)
    for name, bound in _BOUNDS.items():
        value = getattr(text, name, None)
        if isinstance(value, int):
            setattr(text, name, min(value, bound))
        elif isinstance(value, list | tuple):  # one of each layer
            setattr(text, name, [min(each, bound) if isinstance(each, int) else each for each in value])
    for part, name in _token_ids(small):
        setattr(part, name, min(getattr(part, name), TWIN_VOCABULARY - 1))
    return small


def special_ids(small: PreTrainedConfig) -> list[int]:
    """Return ids that a twin's configuration names: of padding, of places for images, and others."""
    return sorted({each for part, name in _token_ids(small) if (each := getattr(part, name)) >= 0})


def _token_ids(config: PreTrainedConfig) -> Iterator[tuple[PreTrainedConfig, str]]:
    """Yield fields that hold an id: positions may begin after that of padding, for one."""
    for part in {id(each): each for each in (config, config.get_text_config())}.values():
        for name in [name for name in vars(part) if name.endswith("_token_id")]:
            if isinstance(getattr(part, name), int):
                yield part, name


def _shape_stacks(config: PreTrainedConfig, small: PreTrainedConfig, *, narrow: bool) -> None:
    """Give both stacks few layers, not as many each, and keep what is tied in both."""
    encoder, decoder = (min(depth, few) for depth, few in zip(stack_depths(config), (3, 2), strict=True))
    wanted = {
        "encoder_layers": encoder,
        "num_hidden_layers": encoder,
        "decoder_layers": decoder,
        "num_decoder_layers": decoder,
    }
    if narrow and hasattr(config, "decoder_attention_heads"):
        wanted["decoder_attention_heads"] = small.num_attention_heads
    heads, width = config.num_attention_heads, getattr(config, "d_kv", None)
    if narrow and width is not None and heads * width != config.hidden_size:
        wanted["hidden_size"] = small.hidden_size + width  # as wide as no number of heads
    if getattr(config, "max_position_embeddings", None):
        wanted["max_position_embeddings"] = _TWIN_POSITIONS
    for name, value in wanted.items():
        if hasattr(small, name):
            setattr(small, name, value)


def _narrow(text: PreTrainedConfig) -> None:
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    few_heads = min(heads, 4)
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    wanted = {
        "num_attention_heads": few_heads,
        "num_key_value_heads": few_heads if kv_heads == heads else max(1, min(kv_heads, few_heads // 2)),
        "head_dim": head_dim,
        "hidden_size": few_heads * head_dim,
        "word_embed_proj_dim": few_heads * head_dim,
    }
    for name, value in wanted.items():
        is_derived = isinstance(getattr(type(text), name, None), property)
        if hasattr(text, name) and not is_derived:
            setattr(text, name, value)


def _cut_layers(text: PreTrainedConfig) -> None:
    """Keep the first layers with every kind among them; twice where late ones take keys of early ones."""
    total = text.num_hidden_layers
    of_layers = {name: value for name, value in vars(text).items() if _has_entries(value, total)}
    kept = max([min(2, total), *map(_first_of_every_kind, of_layers.values())])
    shared = getattr(text, "num_kv_shared_layers", None)
    if shared:
        text.num_kv_shared_layers = kept
    for name in ("num_hidden_layers", "decoder_layers"):
        if hasattr(text, name):
            setattr(text, name, 2 * kept if shared else kept)
    for name, value in of_layers.items():
        setattr(text, name, [*value[:kept], *(value[:kept] if shared else ())])


def _has_entries(value: Any, number: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == number


def _first_of_every_kind(entries: list[Any] | tuple[Any, ...]) -> int:
    """Return how many entries from the first on hold all different ones."""
    kinds = [str(entry) for entry in entries]
    different = set(kinds)
    return max(map(kinds.index, different)) + 1 if len(different) <= _KINDS_AT_MOST else 1


def build_twin(config: PreTrainedConfig, *, narrow: bool = True) -> PreTrainedModel:
    """Return a random model of `twin_config`, in float32, behind our attention implementation."""
    small = twin_config(config, narrow=narrow)
    twin: PreTrainedModel = model_class(config).from_config(
        small, attn_implementation=IMPLEMENTATION, dtype=torch.float32
    )
    for parameter in twin.parameters():
        # Default initialisation gives nearly flat logits, which would hide mistakes.
        if parameter.ndim >= 2:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    modules: Iterable[Any] = twin.modules()
    for module in modules:
        # T5 doesn't scale scores: its queries begin small instead, else a softmax only takes maxima.
        if hasattr(module, "has_relative_attention_bias"):
            module.q.weight.mul_(module.key_value_proj_dim**-0.5)
    twin.eval()
    return twin
