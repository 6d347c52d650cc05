"""The geometry of a loaded model's attention, layer by layer: recorded, never inferred.

`hidden_size / num_heads` is wrong for models with explicit head widths, shared heads or K and V
of different widths, so a short forward pass notes what reaches the attention function. Which module is
which layer of which site is noted the same way, since encoder-decoders number and name theirs differently.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import AttentionMaskInterface

from app.errors import UnsupportedModel
from app.models.attention.packed import IMPLEMENTATION, place_layer
from app.models.weights import in_one_line
from app.prompt import LayerGeometry, ModelGeometry
from app.sites import Site

_RECORDER = "promptplex_recorder"
_LAYER_KINDS = frozenset({"full_attention", "sliding_attention"})
# Frequencies of these follow the longest row of the call, so a long neighbour would change a
# short row; up to the original length they are the plain ones.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
_UNLIMITED_POSITIONS = 1 << 20  # models without a position table or rotary limit
# Of an encoder without a limit: its pass can't be cut, and must not hold up others for minutes.
_LONGEST_SOURCE = 4096
_SOURCE_TOKENS, _TOKENS = 3, 2  # of the recording pass; a layer that sees 3 keys attends to the source


@dataclass(frozen=True, slots=True)
class _Recording:
    """What forward passes of a model showed: the layers of each site, in the order of their calls."""

    site: Callable[[int], Site]  # of a layer that sees so many keys
    layers: dict[Site, dict[nn.Module, LayerGeometry]] = field(default_factory=dict)

    def add(self, module: nn.Module, num_keys: int, layer: LayerGeometry) -> None:
        found = self.layers.setdefault(self.site(num_keys), {})
        found[module] = layer


def _record(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    recorded: _Recording | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    if recorded is None:
        raise UnsupportedModel(
            f"{type(module).__name__} doesn't get the arguments of the model's forward pass, so attention "
            "can't find a packed token's keys and values"
        )
    heads, tokens = query.shape[1:3]
    site = recorded.site(key.shape[2])
    layer = LayerGeometry(
        num_kv_heads=key.shape[1],
        key_dim=key.shape[3],
        value_dim=value.shape[3],
        window=sliding_window,
        queries_per_kv=heads // key.shape[1],
        softcap=softcap,
        has_sinks=s_aux is not None,
        is_causal=site is Site.DECODER_SELF,
        has_position_bias=_is_biased(position_bias, site),
    )
    _check_layer(layer)
    recorded.add(module, key.shape[2], layer)
    return value.new_zeros(1, tokens, heads, value.shape[3]), None


def _is_biased(position_bias: Tensor | None, site: Site) -> bool:
    """Return whether scores get a bias. T5 passes zeros where a layer has none: in cross-attention."""
    if site is Site.DECODER_CROSS and position_bias is not None and position_bias.any():
        raise UnsupportedModel("a bias by position in cross-attention can't be computed exactly")
    return position_bias is not None and site is not Site.DECODER_CROSS


def _check_layer(layer: LayerGeometry) -> None:
    if layer.window is not None and not layer.is_causal:
        raise UnsupportedModel("a window of attention that isn't causal can't be computed exactly")
    if layer.has_position_bias and (layer.softcap is not None or layer.has_sinks):
        raise UnsupportedModel("a bias by position can't be computed exactly beside soft caps and sinks")


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


def record_layers(model: PreTrainedModel) -> tuple[dict[Site, tuple[LayerGeometry, ...]], bool]:
    """Return the geometry of every layer, and whether the model's own cache holds what attention gets.

    Every attention module is told apart from then on, see `place_layer`.

    Raise UnsupportedModel: some layer doesn't attend through transformers' attention interface.
    """
    AttentionInterface.register(_RECORDER, _record)
    AttentionMaskInterface.register(_RECORDER, lambda *_, **__: None)
    run = _run_encoder_decoder if model.config.is_encoder_decoder else _run_decoder
    model.set_attn_implementation(_RECORDER)
    try:
        with torch.inference_mode():
            recorded, cache = run(model)
    except Exception as error:
        raise UnsupportedModel(
            f"the architecture '{model.config.model_type}' can't be served exactly: a forward pass of a few "
            f"tokens through transformers' attention interface fails ({in_one_line(error)})"
        ) from error
    finally:
        model.set_attn_implementation(IMPLEMENTATION)
    _check_layers(recorded, model.config)
    for site, modules in recorded.items():
        for number, module in enumerate(modules):
            place_layer(module, (site, number))
    layers = {site: tuple(modules.values()) for site, modules in recorded.items()}
    own = layers[Site.DECODER_SELF]
    widths = [(layer.num_kv_heads, layer.key_dim, layer.value_dim) for layer in own]
    return layers, widths == [_cached_widths(each) for each in cache.layers]


_Layers = dict[Site, dict[nn.Module, LayerGeometry]]


def _run_decoder(model: PreTrainedModel) -> tuple[_Layers, DynamicCache]:
    recorded = _Recording(lambda num_keys: Site.DECODER_SELF)
    cache = DynamicCache(config=model.config)
    ids = torch.zeros(1, _TOKENS, dtype=torch.long, device=model.device)
    model(input_ids=ids, past_key_values=cache, use_cache=True, recorded=recorded)
    return recorded.layers, cache


def _run_encoder_decoder(model: PreTrainedModel) -> tuple[_Layers, DynamicCache]:
    ids = torch.zeros(1, _SOURCE_TOKENS, dtype=torch.long, device=model.device)
    encoding = _Recording(lambda num_keys: Site.ENCODER_SELF)
    encoded = model.get_encoder()(input_ids=ids, recorded=encoding)
    sites = {_SOURCE_TOKENS: Site.DECODER_CROSS, _TOKENS: Site.DECODER_SELF}
    decoding = _Recording(lambda num_keys: sites[num_keys])
    cache = DynamicCache()  # made without the configuration, which may name the encoder's layers
    model(
        encoder_outputs=encoded,
        decoder_input_ids=ids[:, :_TOKENS],
        past_key_values=EncoderDecoderCache(cache, DynamicCache()),
        use_cache=True,
        recorded=decoding,
    )
    return decoding.layers | encoding.layers, cache


def _check_layers(recorded: _Layers, config: PreTrainedConfig) -> None:
    for site, num_layers in _configured_layers(config).items():
        found = len(recorded.get(site, ()))
        if found < num_layers:
            raise UnsupportedModel(
                f"the architecture '{config.model_type}' sends {found} of its {num_layers} layers "
                "through transformers' attention interface; the others attend on their own, where no prompt "
                "reaches them"
            )
        if found > num_layers:
            kind = "encoder-decoder" if config.is_encoder_decoder else "decoder"
            raise UnsupportedModel(
                f"the architecture '{config.model_type}' attends in {found} layers and is configured "
                f"to have {num_layers}: it is no plain {kind}"
            )


def _configured_layers(config: PreTrainedConfig) -> dict[Site, int]:
    if not config.is_encoder_decoder:
        return {Site.DECODER_SELF: config.get_text_config().num_hidden_layers}
    encoder, decoder = stack_depths(config)
    return {Site.ENCODER_SELF: encoder, Site.DECODER_SELF: decoder, Site.DECODER_CROSS: decoder}


def stack_depths(config: PreTrainedConfig) -> tuple[int, int]:
    """Return the numbers of layers of an encoder-decoder's two stacks."""
    encoder = getattr(config, "encoder_layers", None) or config.num_hidden_layers
    named = (getattr(config, name, None) for name in ("decoder_layers", "num_decoder_layers"))
    return encoder, next(filter(None, named), config.num_hidden_layers)


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
    longest = limit if limit < _UNLIMITED_POSITIONS else max_context or _LONGEST_SOURCE
    layers, takes_prefixes = record_layers(model)
    return ModelGeometry(
        architecture=model.config.model_type,
        hidden_size=int(hidden_size),
        vocab_size=int(vocab_size),
        max_positions=min(limit, max_context) if max_context else limit,
        layers=layers,
        dtype=str(model.dtype).removeprefix("torch."),
        fingerprint=fingerprint,
        takes_prefixes=takes_prefixes,
        max_source_positions=min(longest, max_context or longest) if model.config.is_encoder_decoder else 0,
    )
