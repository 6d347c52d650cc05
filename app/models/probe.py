"""Prove at load that packed attention computes what the model itself computes, or refuse.

First on a tiny float32 twin of the architecture (few layers, random weights, small window):
prompts of every kind, two chunks, decoding past the window, a short row beside a long neighbour,
each against the model's own eager forward pass alone. Then shortly on the real weights.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from app.errors import UnsupportedModel
from app.models.attention.kv_cache import KVCache
from app.models.attention.packed import IMPLEMENTATION
from app.models.attention.step import PackedItem, build_step
from app.models.decoder_only import DecoderOnly
from app.models.geometry import check_layer_kinds, model_geometry
from app.models.weights import is_quantized
from app.prompt import ModelGeometry

# Largest difference of a log-probability between packed and own forward in float32.
TWIN_TOLERANCE = 1e-4
# Relative error of the logits on the real weights: rounding of the load dtype, nothing else.
WEIGHTS_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 8e-2, torch.float16: 2e-2}
# Below this a prefix hardly changes the twin's answer and the comparison proves nothing.
_MIN_PREFIX_EFFECT = 1e-2
_PREFIX_LENGTH = 5
_TWIN_WINDOW = 8
_TWIN_VOCABULARY = 128


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """What the probes measured; `promptplex doctor` and `/info` show it."""

    twin_error: float  # max |difference of log-probabilities|, float32 twin
    weights_error: float  # relative error of logits, real weights in the load dtype
    geometry: ModelGeometry


@dataclass
class _Probe:
    """One sequence of the twin's run, teacher-forced on random tokens."""

    embeds: Tensor  # [n, d]
    chunks: list[int]  # how many tokens each step takes
    prefix: list[tuple[Tensor, Tensor]] | None = None  # per layer, K and V [1, Hk, p, D]
    computed: int = 0

    @property
    def prefix_length(self) -> int:
        return _PREFIX_LENGTH if self.prefix else 0


def probe_architecture(config: PreTrainedConfig) -> float:
    """Run the twin; the largest error found.

    Raises:
        UnsupportedModel: the twin can't be built or run, or its error is out of tolerance.
    """
    name = config.model_type
    check_layer_kinds(config)
    if not hasattr(config.get_text_config(), "num_attention_heads"):
        raise UnsupportedModel(f"the architecture '{name}' has no attention layers for a prompt to reach")
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(0)
        try:
            twin = _build_twin(config)
            backbone = DecoderOnly(twin, model_geometry(twin, "twin"))
            error = _twin_error(twin, backbone)
        except UnsupportedModel:
            raise
        except Exception as cause:
            raise UnsupportedModel(
                f"the architecture '{name}' could not be probed: {_reason(cause)}"
            ) from cause
    if not error <= TWIN_TOLERANCE:  # a NaN fails too
        raise UnsupportedModel(
            f"the architecture '{name}' differs from its own forward pass by {error:.2e} in log-probability "
            f"when sequences are packed (tolerance {TWIN_TOLERANCE:.0e}); it would serve wrong numbers"
        )
    return error


def _reason(cause: Exception) -> str:
    if isinstance(cause, KeyError) and cause.args == (IMPLEMENTATION,):
        return "it picks its attention from a table of its own, so packed attention can't be put in"
    return f"{type(cause).__name__}: {cause}"


def own_logits(model: PreTrainedModel) -> Tensor:
    """What the real weights say of eight tokens, alone, before anything is accelerated."""
    with torch.inference_mode():
        return _own_logits(model, _weights_probe(model))


def probe_weights(backbone: DecoderOnly, own: Tensor) -> float:
    """Compare packed logits with the model's `own_logits`; their relative error.

    Raises:
        UnsupportedModel: the error is out of tolerance for the load dtype.
    """
    probe = _weights_probe(backbone.model)
    beside = _Probe(probe.embeds[:3], chunks=[1, 1, 1])  # a shorter row, so that there is padding
    with torch.inference_mode():
        found = torch.cat([logits for rows in _packed_logits(backbone, [probe, beside]) for logits in rows])
    expected = own[[*(np.cumsum(probe.chunks) - 1), *(np.cumsum(beside.chunks) - 1)]]
    error = float((found - expected).norm() / expected.norm())
    if not own.isfinite().all():
        raise UnsupportedModel(
            f"the weights of this '{backbone.geometry.architecture}' give NaN or infinite logits in "
            f"{backbone.geometry.dtype}, alone and unpacked: they are damaged, or need another --dtype"
        )
    tolerance = _tolerance(backbone)
    if not error <= tolerance:
        raise UnsupportedModel(
            f"the weights of this '{backbone.geometry.architecture}' in {backbone.geometry.dtype} give "
            f"logits that differ by {error:.2e} from the model's own forward pass (tolerance "
            f"{tolerance:.0e}); try --dtype float32"
        )
    return error


def _tolerance(backbone: DecoderOnly) -> float:
    """Quantized layers may round their inputs too, as coarsely as bfloat16 does."""
    dtype = torch.bfloat16 if is_quantized(backbone.model.config) else backbone.dtype
    return WEIGHTS_TOLERANCE[dtype]


def _weights_probe(model: PreTrainedModel) -> _Probe:
    embedding = model.get_input_embeddings()
    ids = torch.tensor([(7919 * i) % model.config.get_text_config().vocab_size for i in range(1, 9)])
    return _Probe(embedding(ids.to(model.device)), chunks=[5, 1, 1, 1])


def twin_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same architecture made small. Head widths stay, since rotary tables depend on them."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    few_heads = min(heads, 4)
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    few_kv_heads = few_heads if kv_heads == heads else max(1, min(kv_heads, few_heads // 2))
    kinds = getattr(text, "layer_types", None)
    wanted = {
        "num_attention_heads": few_heads,
        "num_key_value_heads": few_kv_heads,
        "head_dim": head_dim,
        "hidden_size": few_heads * head_dim,
        "word_embed_proj_dim": few_heads * head_dim,
        "num_hidden_layers": _layers_of_every_kind(kinds, text.num_hidden_layers),
        "vocab_size": _TWIN_VOCABULARY,
    }
    bounds = {
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
        "sliding_window": _TWIN_WINDOW,
        "attention_chunk_size": _TWIN_WINDOW,
        "floor_scale": _TWIN_WINDOW,  # positions from which Llama 4 scales its queries
    }
    for name, value in wanted.items():
        is_derived = isinstance(getattr(type(text), name, None), property)
        if hasattr(text, name) and not is_derived:
            setattr(text, name, value)
    for name, bound in bounds.items():
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, min(getattr(text, name), bound))
    if kinds:
        text.layer_types = list(kinds[: text.num_hidden_layers])
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, name, None)
    return small


def _layers_of_every_kind(kinds: Sequence[str] | None, num_layers: int) -> int:
    if not kinds:
        return min(2, num_layers)
    return max(min(2, num_layers), max(list(kinds).index(kind) + 1 for kind in set(kinds)))


def _build_twin(config: PreTrainedConfig) -> PreTrainedModel:
    small = twin_config(config)
    twin: PreTrainedModel = AutoModelForCausalLM.from_config(
        small, attn_implementation=IMPLEMENTATION, dtype=torch.float32
    )
    for parameter in twin.parameters():
        # Default initialisation gives nearly flat logits, which would hide mistakes.
        if parameter.ndim >= 2:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    twin.eval()
    return twin


def _twin_error(twin: PreTrainedModel, backbone: DecoderOnly) -> float:
    def tokens(length: int) -> Tensor:
        return backbone.embed(torch.randint(0, _TWIN_VOCABULARY, (length,)))

    prefix = [
        (torch.randn(1, layer.num_kv_heads, _PREFIX_LENGTH, layer.key_dim),
         torch.randn(1, layer.num_kv_heads, _PREFIX_LENGTH, layer.value_dim))
        for layer in backbone.geometry.decoder
    ]  # fmt: skip
    past_window = [1] * (_TWIN_WINDOW + 4)
    long_row = _Probe(tokens(40 + len(past_window)), chunks=[23, 17, *past_window])
    short_row = _Probe(tokens(3 + 9), chunks=[3, *[1] * 9])
    one_token = _Probe(tokens(1 + 4), chunks=[1] * 5)
    prefixed = _Probe(tokens(13 + len(past_window)), chunks=[6, 7, *past_window], prefix=prefix)
    probes = [long_row, short_row, one_token, prefixed]
    expected = [_own_logits(twin, probe) for probe in probes]
    bare = _own_logits(twin, _Probe(prefixed.embeds, prefixed.chunks))
    effect = _distance(bare, expected[-1])
    if not effect >= _MIN_PREFIX_EFFECT:
        raise UnsupportedModel(
            f"the architecture '{backbone.geometry.architecture}' ignores keys and values put before its "
            f"tokens (they change log-probabilities by {effect:.1e}), so prefixes would have no effect"
        )
    found = _packed_logits(backbone, probes)
    return max(
        _distance(torch.cat(logits), whole[np.cumsum(probe.chunks) - 1])
        for probe, logits, whole in zip(probes, found, expected, strict=True)
    )


def _distance(left: Tensor, right: Tensor) -> float:
    return float((left.log_softmax(-1) - right.log_softmax(-1)).abs().max())


def _own_logits(model: PreTrainedModel, probe: _Probe) -> Tensor:
    """Logits `[n, V]` of all tokens by the model's own eager attention, alone, in one pass."""
    cache = DynamicCache(config=model.config) if probe.prefix else None
    for layer, (keys, values) in enumerate(probe.prefix or []):
        assert cache is not None
        cache.update(keys, values, layer)
    length = probe.embeds.shape[0]
    positions = torch.arange(probe.prefix_length, probe.prefix_length + length, device=model.device)
    model.set_attn_implementation("eager")
    try:
        outputs = model(
            inputs_embeds=probe.embeds.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            attention_mask=torch.ones(1, probe.prefix_length + length, dtype=torch.long, device=model.device),
            past_key_values=cache,
            use_cache=cache is not None,
        )
    finally:
        model.set_attn_implementation(IMPLEMENTATION)
    logits: Tensor = outputs.logits[0].float()
    return logits


def _packed_logits(backbone: DecoderOnly, probes: list[_Probe]) -> list[list[Tensor]]:
    """Logits after each chunk of each probe, all probes packed into shared steps."""
    capacity = max(probe.prefix_length + probe.embeds.shape[0] for probe in probes)
    num_slots = [1 + capacity * len(probes)] * len(backbone.kv_groups)
    cache = KVCache(backbone.kv_groups, num_slots, dtype=backbone.dtype, device=backbone.device)
    # Interleaved on purpose: identity tables would hide a wrong slot.
    slots = [np.arange(capacity, dtype=np.int64) * len(probes) + 1 + i for i in range(len(probes))]
    for probe, own in zip(probes, slots, strict=True):
        for layer, (keys, values) in enumerate(probe.prefix or []):
            target = torch.from_numpy(own[: probe.prefix_length])
            cache.write(layer, target, keys[0].transpose(0, 1), values[0].transpose(0, 1))
    collected: list[list[Tensor]] = [[] for _ in probes]
    for number in range(max(len(probe.chunks) for probe in probes)):
        active = [i for i, probe in enumerate(probes) if number < len(probe.chunks)]
        active.sort(key=_tokens_at(probes, number))
        for i, logits in zip(
            active, _packed_step(backbone, cache, probes, slots, active, number), strict=True
        ):
            collected[i].append(logits.unsqueeze(0))
    return collected


def _tokens_at(probes: list[_Probe], number: int) -> Callable[[int], bool]:
    return lambda i: probes[i].chunks[number] > 1


def _packed_step(
    backbone: DecoderOnly,
    cache: KVCache,
    probes: list[_Probe],
    slots: list[np.ndarray[tuple[int], np.dtype[np.int64]]],
    active: list[int],
    number: int,
) -> Tensor:
    items, embeds, positions = [], [], []
    for i in active:
        probe, count = probes[i], probes[i].chunks[number]
        start = probe.prefix_length + probe.computed
        items.append(PackedItem(start, count, (slots[i][: start + count],) * len(cache.groups)))
        embeds.append(probe.embeds[probe.computed : probe.computed + count])
        positions.append(torch.arange(start, start + count, device=backbone.device))
        probe.computed += count
    last = torch.tensor([item.num_tokens for item in items], device=backbone.device).cumsum(0) - 1
    return backbone.forward(torch.cat(embeds), torch.cat(positions), build_step(cache, items), last)
