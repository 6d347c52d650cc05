"""Prove at load that packed attention computes what the model itself computes, or refuse.

First on a tiny float32 twin of the architecture: prompts of every kind, two chunks, decoding past the
window, a short row beside a long neighbour, each against the model's own eager forward pass alone, from
token ids, as its users run it. Encoder-decoders read sources of different lengths, some of them new beside
rows that decode. Then shortly on the real weights.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from app.errors import UnsupportedModel
from app.models.attention.packed import IMPLEMENTATION
from app.models.attention.prefixed import register_prefixed
from app.models.backbones import AnyBackbone, backbone_of
from app.models.geometry import check_layer_kinds, model_geometry, stack_depths
from app.models.probe_rounding import Rounding
from app.models.probe_sequences import (
    ProbeSequence,
    ProbeSource,
    eager_logits,
    own_logits_of,
    packed_logits,
)
from app.models.probe_sources import (
    one_by_one_from_source,
    random_prefix,
    source_ids,
    source_sequences,
)
from app.models.twin import TWIN_VOCABULARY, TWIN_WINDOW, build_twin, special_ids
from app.models.weights import in_one_line, is_quantized
from app.prompt import ModelGeometry
from app.sites import Site

# Largest difference of a log-probability between packed and own forward in float32.
TWIN_TOLERANCE = 1e-4
# Relative error of the logits on the real weights: rounding of the load dtype, nothing else.
WEIGHTS_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 8e-2, torch.float16: 2e-2}
# Below this a prefix hardly changes the twin's answer and the comparison proves nothing.
_MIN_PREFIX_EFFECT = 1e-2
# Logits of the same tokens given in another way differ by rounding, or by far more than this.
_INPUTS_TOLERANCE = 1e-3
_SOFT_LENGTH = 6
_LONGEST_REASON = 200


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """What the probes measured; `promptplex doctor` and `/info` show it."""

    twin_error: float  # max |difference of log-probabilities|, float32 twin
    weights_error: float | None  # relative error of logits, real weights in the load dtype; None: rounded
    rounding: Rounding | None = None  # of weights in 8 bits

    def __str__(self) -> str:
        weights = (
            f"logits within {self.weights_error:.1e} (relative) on the weights as loaded"
            if self.rounding is None
            else str(self.rounding)
        )
        return (
            "packed attention against the model's own forward pass: log-probabilities within "
            f"{self.twin_error:.1e} on a float32 twin, {weights}"
        )


def probe_architecture(config: PreTrainedConfig) -> float:
    """Run the twin; return the largest error found.

    Raise UnsupportedModel: the twin can't be built or run, or its error is out of tolerance.
    """
    name = config.model_type
    with _refusing(name, "its configuration doesn't say which part generates text"):
        check_layer_kinds(config)
    if config.is_encoder_decoder:
        with _refusing(name, "its configuration doesn't say how many layers its encoder and decoder have"):
            stack_depths(config)
    if not hasattr(config.get_text_config(), "num_attention_heads"):
        raise UnsupportedModel(f"the architecture '{name}' has no attention layers for a prompt to reach")
    _check_experts(config)
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(0)
        twin = _running_twin(config)
        with _refusing(name, "its attention can't be taken over"):
            geometry = model_geometry(twin, "twin")
            own = copy.deepcopy(twin)  # a backbone may replace modules
            backbone = backbone_of(twin, geometry)
        if geometry.has_encoder:
            register_prefixed()
            _check_generation(own, name)
        else:
            _check_inputs(own, name)
        with _refusing(name, "packed sequences don't run through it"):
            error = _twin_error(own, backbone)
    if not error <= TWIN_TOLERANCE:  # a NaN fails too
        raise UnsupportedModel(
            f"the architecture '{name}' differs from its own forward pass by {error:.2e} in log-probability "
            f"when sequences are packed (tolerance {TWIN_TOLERANCE:.0e}); it would serve wrong numbers"
        )
    return error


def _check_experts(config: PreTrainedConfig) -> None:
    if getattr(config, "expert_capacity", None) is not None:
        raise UnsupportedModel(
            f"the architecture '{config.model_type}' can't be served exactly: its experts take a limited "
            "number of a call's tokens, so a request would change its neighbours"
        )


@contextlib.contextmanager
def _refusing(name: str, what: str) -> Iterator[None]:
    """Turn any exception within into a refusal in one sentence."""
    try:
        yield
    except UnsupportedModel:
        raise
    except Exception as cause:
        raise UnsupportedModel(
            f"the architecture '{name}' can't be served exactly: {what} ({_reason(cause)})"
        ) from cause


def _reason(cause: Exception) -> str:
    if isinstance(cause, KeyError) and cause.args == (IMPLEMENTATION,):
        return "it picks its attention from a table of its own"
    return f"{type(cause).__name__}: {in_one_line(cause)[:_LONGEST_REASON]}"


def _running_twin(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a twin that runs. Some architectures tie numbers of heads to others: those stay then."""
    with contextlib.suppress(Exception):
        twin = build_twin(config)
        own_logits_of(twin, _shortest(config))
        return twin
    with _refusing(config.model_type, "no small twin of it runs, so nothing can be compared"):
        twin = build_twin(config, narrow=False)
        own_logits_of(twin, _shortest(config))
    return twin


def _shortest(config: PreTrainedConfig) -> ProbeSequence:
    source = ProbeSource(_random_ids(3)) if config.is_encoder_decoder else None
    return ProbeSequence(_random_ids(3), [3], source=source)


def _random_ids(number: int) -> Tensor:
    return torch.randint(0, TWIN_VOCABULARY, (number,))


def _check_inputs(twin: PreTrainedModel, name: str) -> None:
    """Refuse a twin if its logits change with the way its tokens come.

    Prompts are embeddings, packed rows have explicit positions, tokens come one by one with a cache: all
    must give the logits of token ids alone, in one pass.
    """
    ids = torch.cat([_random_ids(2 * TWIN_WINDOW), torch.tensor(special_ids(twin.config), dtype=torch.long)])
    expected = own_logits_of(twin, ProbeSequence(ids, [len(ids)]))
    row, embeds = ids.unsqueeze(0), twin.get_input_embeddings()(ids).unsqueeze(0)
    with _refusing(name, "it doesn't run from embeddings that are no token's, as a soft prompt's are"):
        own_logits_of(twin, ProbeSequence(ids, [len(ids) + 1], soft=torch.randn_like(embeds[0, :1])))
    ways: dict[str, Callable[[], Tensor]] = {
        "from embeddings": lambda: eager_logits(twin, inputs_embeds=embeds),
        "at positions from 0 on": lambda: eager_logits(
            twin, input_ids=row, position_ids=torch.arange(len(ids)).unsqueeze(0)
        ),
        "one token at a time": lambda: _one_by_one(twin, row),
    }
    for how, run in ways.items():
        with _refusing(name, f"it doesn't run {how}"):
            difference = _distance(run(), expected)
        if not difference <= _INPUTS_TOLERANCE:
            raise UnsupportedModel(
                f"the architecture '{name}' can't be served exactly: {how} it computes something else than "
                f"from token ids in one pass (log-probabilities differ by {difference:.1e})"
            )


def _check_generation(own: PreTrainedModel, name: str) -> None:
    """Refuse an encoder-decoder that generates, one token at a time, what one pass doesn't give."""
    source, row = (source_ids(own.config, number)[None] for number in (2 * TWIN_WINDOW, TWIN_WINDOW))
    how = "one token at a time"
    with _refusing(name, f"it doesn't run {how}"):
        expected = eager_logits(own, input_ids=source, decoder_input_ids=row)
        difference = _distance(one_by_one_from_source(own, source, row), expected)
    if not difference <= _INPUTS_TOLERANCE:
        raise UnsupportedModel(
            f"the architecture '{name}' can't be served exactly: {how} it computes something else than "
            f"from token ids in one pass (log-probabilities differ by {difference:.1e})"
        )


def _one_by_one(twin: PreTrainedModel, row: Tensor) -> Tensor:
    """Return logits `[n, V]` of `row [1, n]` as generation computes them, with the model's own cache."""
    cache = DynamicCache(config=twin.config)
    logits = []
    for place, ids in enumerate(row.T):
        seen = torch.ones(1, place + 1, dtype=torch.long)
        given = {"input_ids": ids[None], "position_ids": torch.tensor([[place]]), "attention_mask": seen}
        logits.append(eager_logits(twin, past_key_values=cache, use_cache=True, **given))
    return torch.cat(logits)


def own_logits(model: PreTrainedModel) -> list[Tensor]:
    """Return logits of the real weights for a few tokens, alone, before anything is accelerated.

    Raise UnsupportedModel: a forward pass fails.
    """
    what = "a forward pass of the real weights fails"
    with torch.inference_mode(), _refusing(model.config.model_type, what):
        return [own_logits_of(model, sequence) for sequence in _weights_sequences(model)]


def probe_weights(backbone: AnyBackbone, own: list[Tensor]) -> float:
    """Compare packed logits with the model's `own_logits`; return their relative error.

    Raise UnsupportedModel: the error is out of tolerance for the load dtype.
    """
    sequences = _weights_sequences(backbone.model)
    what = "a packed forward pass of the real weights fails"
    with torch.inference_mode(), _refusing(backbone.geometry.architecture, what):
        found = torch.cat(packed_logits(backbone, sequences))
    expected = torch.cat([whole[each.ends] for each, whole in zip(sequences, own, strict=True)])
    error = float((found - expected).norm() / expected.norm())
    if not all(whole.isfinite().all() for whole in own):
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


def _tolerance(backbone: AnyBackbone) -> float:
    """Return the tolerance; quantized layers may round their inputs as coarsely as bfloat16 does."""
    dtype = torch.bfloat16 if is_quantized(backbone.model.config) else backbone.dtype
    return WEIGHTS_TOLERANCE[dtype]


def _weights_sequences(model: PreTrainedModel) -> list[ProbeSequence]:
    """Return a sequence, a shorter one, so that there is padding, and one that begins with a soft prompt.

    An encoder-decoder's soft prompt stands in its encoder; the last sequence begins after the others.
    """
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.tensor([(7919 * i) % vocabulary for i in range(1, 9)], device=model.device)
    embeds = model.get_input_embeddings()(ids)
    between = (embeds[:2] + embeds[2:4]) / 2  # rows of no token
    if model.config.is_encoder_decoder:
        return [
            ProbeSequence(ids[:4], chunks=[1, 1, 1, 1], source=ProbeSource(ids)),
            ProbeSequence(ids[4:7], chunks=[2, 1], source=ProbeSource(ids[5:])),
            ProbeSequence(ids[:3], chunks=[1, 1, 1], source=ProbeSource(ids[2:6], soft=between), starts_at=2),
        ]
    return [
        ProbeSequence(ids, chunks=[5, 1, 1, 1]),
        ProbeSequence(ids[:3], chunks=[1, 1, 1]),
        ProbeSequence(ids[4:], chunks=[4, 1, 1], soft=between),
    ]


def _twin_error(own: PreTrainedModel, backbone: AnyBackbone) -> float:
    geometry = backbone.geometry
    sequences = source_sequences(own.config, geometry) if geometry.has_encoder else _sequences(geometry)
    for sequence in sequences:
        _check_prefixes(own, sequence)
    expected = [own_logits_of(own, each)[each.ends] for each in sequences]
    return max(map(_distance, packed_logits(backbone, sequences), expected))


def _sequences(geometry: ModelGeometry) -> list[ProbeSequence]:
    past_window = [1] * (TWIN_WINDOW + 4)
    soft = torch.randn(_SOFT_LENGTH, geometry.hidden_size)
    sequences = [
        ProbeSequence(_random_ids(40 + len(past_window)), [23, 17, *past_window]),
        ProbeSequence(_random_ids(3 + 9), [3, *[1] * 9]),
        ProbeSequence(_random_ids(1 + 4), [1] * 5),
        ProbeSequence(_random_ids(11 + len(past_window)), [_SOFT_LENGTH + 4, 7, *past_window], soft=soft),
    ]
    if geometry.takes_prefixes:
        prefixes = {Site.DECODER_SELF: random_prefix(geometry.layers[Site.DECODER_SELF])}
        ids = _random_ids(13 + len(past_window))
        sequences.append(ProbeSequence(ids, [6, 7, *past_window], prefixes=prefixes))
    return sequences


def _check_prefixes(own: PreTrainedModel, prefixed: ProbeSequence) -> None:
    """Refuse a model that one of a sequence's prefixes doesn't reach."""
    for site in prefixed.prefixes:
        others = {each: prefix for each, prefix in prefixed.prefixes.items() if each is not site}
        bare = replace(prefixed, prefixes=others)
        effect = _distance(own_logits_of(own, bare), own_logits_of(own, prefixed))
        if not effect >= _MIN_PREFIX_EFFECT:
            raise UnsupportedModel(
                f"the architecture '{own.config.model_type}' ignores keys and values put before its "
                f"tokens ({site}: they change log-probabilities by {effect:.1e}), so prefixes would have no "
                "effect"
            )


def _distance(left: Tensor, right: Tensor) -> float:
    return float((left.log_softmax(-1) - right.log_softmax(-1)).abs().max())
