"""The geometry of a loaded model's attention, layer by layer: recorded, never inferred.

`hidden_size / num_heads` is wrong for models with explicit head widths, shared heads or K and V
of different widths, so a two-token forward pass notes what reaches the attention function.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import AttentionMaskInterface

from app.errors import UnsupportedModel
from app.models.attention.packed import IMPLEMENTATION
from app.models.weights import in_one_line
from app.prompt import LayerGeometry, ModelGeometry
from app.sites import Site

_RECORDER = "promptplex_recorder"
_LAYER_KINDS = frozenset({"full_attention", "sliding_attention"})
# Frequencies of these follow the longest row of the call, so a long neighbour would change a
# short row; up to the original length they are the plain ones.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
_UNLIMITED_POSITIONS = 1 << 20  # models without a position table or rotary limit


def _record(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    recorded: dict[int, LayerGeometry] | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    if recorded is None:
        raise UnsupportedModel(
            f"{type(module).__name__} doesn't get the arguments of the model's forward pass, so attention "
            "can't find a packed token's keys and values"
        )
    layer = int(module.layer_idx)  # type: ignore[arg-type]  # an attribute by transformers' convention
    heads, tokens = query.shape[1:3]
    recorded[layer] = LayerGeometry(
        num_kv_heads=key.shape[1],
        key_dim=key.shape[3],
        value_dim=value.shape[3],
        window=sliding_window,
        queries_per_kv=heads // key.shape[1],
        softcap=softcap,
        has_sinks=s_aux is not None,
    )
    return value.new_zeros(1, tokens, heads, value.shape[3]), None


def check_layer_kinds(config: PreTrainedConfig) -> None:
    """Refuse layers with masks other than causal ones and sliding windows.

    Chunked attention (Llama 4) doesn't pass its chunks to the attention function.

    Raise UnsupportedModel, which names the kind.
    """
    kinds = getattr(config.get_text_config(), "layer_types", None) or []
    unknown = sorted(set(kinds) - _LAYER_KINDS)
    if unknown:
        raise UnsupportedModel(
            f"the architecture '{config.model_type}' has layers of kind {', '.join(unknown)}; only "
            f"{' and '.join(sorted(_LAYER_KINDS))} can be served exactly"
        )


def record_layers(model: PreTrainedModel) -> tuple[tuple[LayerGeometry, ...], bool]:
    """Return the geometry of every layer, and whether the model's own cache holds what attention gets.

    Raise UnsupportedModel: some layer doesn't attend through transformers' attention interface.
    """
    AttentionInterface.register(_RECORDER, _record)
    AttentionMaskInterface.register(_RECORDER, lambda *_, **__: None)
    recorded: dict[int, LayerGeometry] = {}
    cache = DynamicCache(config=model.config)
    model.set_attn_implementation(_RECORDER)
    try:
        with torch.inference_mode():
            ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
            model(input_ids=ids, past_key_values=cache, use_cache=True, recorded=recorded)
    except Exception as error:
        raise UnsupportedModel(
            f"the architecture '{model.config.model_type}' can't be served exactly: a two-token forward pass "
            f"through transformers' attention interface fails ({in_one_line(error)})"
        ) from error
    finally:
        model.set_attn_implementation(IMPLEMENTATION)
    _check_layers(recorded, model.config)
    layers = tuple(recorded[layer] for layer in sorted(recorded))
    widths = [(layer.num_kv_heads, layer.key_dim, layer.value_dim) for layer in layers]
    return layers, widths == [_cached_widths(each) for each in cache.layers]


def _check_layers(recorded: dict[int, LayerGeometry], config: PreTrainedConfig) -> None:
    num_layers = config.get_text_config().num_hidden_layers
    missing = num_layers - len(recorded.keys() & set(range(num_layers)))
    if missing:
        raise UnsupportedModel(
            f"the architecture '{config.model_type}' sends {num_layers - missing} of its {num_layers} layers "
            "through transformers' attention interface; the others attend on their own, where no prompt "
            "reaches them"
        )
    if len(recorded) > num_layers:
        raise UnsupportedModel(
            f"the architecture '{config.model_type}' attends in {len(recorded)} layers and is configured "
            f"to have {num_layers}: it is no plain decoder"
        )


def _cached_widths(cached: Any) -> tuple[int, int, int] | None:
    """Return the widths of a layer of transformers' cache; None where it holds no keys and values."""
    keys, values = getattr(cached, "keys", None), getattr(cached, "values", None)
    if not isinstance(keys, Tensor) or not isinstance(values, Tensor) or keys.ndim != 4 or values.ndim != 4:
        return None
    return keys.shape[1], keys.shape[3], values.shape[3]


def max_positions(config: PreTrainedConfig) -> int:
    """Return how many positions virtual, prompt and generated tokens may take together."""
    config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or _UNLIMITED_POSITIONS
    for rope in _rope_settings(config):
        if rope.get("rope_type") in _LENGTH_DEPENDENT_ROPE:
            limit = min(limit, int(rope.get("original_max_position_embeddings") or limit))
    return int(limit)


def _rope_settings(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """Return rotary settings: one dictionary, or one for each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    return nested or [rope]


def model_geometry(model: PreTrainedModel, fingerprint: str, max_context: int | None = None) -> ModelGeometry:
    """Return the geometry of a model that was loaded with our attention implementation."""
    vocab_size, hidden_size = model.get_input_embeddings().weight.shape  # type: ignore[misc]  # a Tensor
    limit = max_positions(model.config)
    layers, takes_prefixes = record_layers(model)
    return ModelGeometry(
        architecture=model.config.model_type,
        hidden_size=int(hidden_size),
        vocab_size=int(vocab_size),
        max_positions=min(limit, max_context) if max_context else limit,
        layers={Site.DECODER_SELF: layers},
        dtype=str(model.dtype).removeprefix("torch."),
        fingerprint=fingerprint,
        takes_prefixes=takes_prefixes,
    )
