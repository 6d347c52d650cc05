"""Which decoders can run by `FusedLayers`: those whose layers have the parts of a Llama's.

Names alone don't say what a layer computes. Layers are taken over only if each gives what transformers' own
gives on a small step.
"""

import math
from collections.abc import Callable, Iterable
from inspect import signature
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import ModuleList

from app.models.attention.cpu import CPUBackend
from app.models.attention.kv_cache import KVCache
from app.models.attention.metadata import PackedItem
from app.models.cpu.decoder_layers import DecoderLayer, DecoderShape, FusedLayers
from app.models.cpu.mlp import activation_of
from app.models.cpu.packed_linear import Weights, fastest_packer, is_plain
from app.models.cpu.products import Panels, concatenated, product_kind
from app.models.cpu.rms_norm import epsilon_of
from app.models.decoder_only import DecoderOnly
from app.prompt import LayerGeometry
from app.sites import Site

_LANES = 16  # widths are whole numbers of vectors
_LENGTHS = (1, 2, 5)  # of the sequences on which outputs are compared
_TOLERANCE = 2e-2  # of the change that a layer makes
_GAIN = math.log(1.25)  # of one call instead of modules, where products are equally fast
_ROUNDING = 2**-8  # of its output: bf16's
_NORMS = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_OTHERS = ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_ACTIVATION = "mlp.act_fn"


class _Call(NamedTuple):
    """What a layer was given, and what it made of it."""

    hidden: Any  # [1, T, d]
    arguments: dict[str, Any]
    output: Any  # [1, T, d]


class _Traits(NamedTuple):
    """What all layers of a decoder must have in common."""

    shape: DecoderShape
    epsilon: float
    scaling: float


def fuse_layers(backbone: DecoderOnly, weights: Weights = "auto") -> bool:
    """Put `FusedLayers` in the place of a decoder's layers; return whether they are of that kind.

    They stay where oneDNN's products are faster, and where some layer's output differs in bf16.
    """
    pack = Panels.quantise if weights == "int8" else Panels.pack
    layers = _layers(backbone)
    if not all(isinstance(each, CPUBackend) for each in backbone.backends) or product_kind() is None:
        return False
    if not layers or not all(map(_has_usual_parts, layers)) or not (weights == "int8" or _pays(layers[0])):
        return False
    calls = _recorded_calls(backbone, layers)
    if len(calls) != len(layers) or not all(map(_is_usual, calls)):
        return False
    common = _common_traits(backbone, layers, calls)
    if common is None:
        return False
    if not all(_agrees(layer, number, common, calls[number]) for number, layer in enumerate(layers)):
        return False
    packed = []
    for number, layer in enumerate(layers):
        packed.append(_packed(layer, pack))
        layers[number] = nn.Identity()  # frees the plain weights, one layer at a time
    del layers[:]
    layers.append(_fused(packed, range(len(packed)), common))
    return True


def _layers(backbone: DecoderOnly) -> ModuleList:
    """Return the decoder's list of layers; an empty one where it has none under the usual name."""
    num_layers = len(backbone.geometry.layers[Site.DECODER_SELF])
    lists = (getattr(module, "layers", None) for module in backbone.model.modules())
    found = (each for each in lists if isinstance(each, ModuleList) and len(each) == num_layers)
    return next(found, ModuleList())


def _has_usual_parts(layer: nn.Module) -> bool:
    """Return whether a layer has all parts of a Llama's, of kinds that the kernel takes, and no others."""
    leaves = {name: part for name, part in layer.named_modules() if name and not any(part.children())}
    linears = [leaves.pop(name, None) for name in (*_QKV, *_OTHERS)]
    norms = [leaves.pop(name, None) for name in _NORMS]
    activation = activation_of(leaves.pop(_ACTIVATION, None))
    is_normed = [norm is not None and epsilon_of(norm) is not None for norm in norms]
    has_no_other = not leaves and is_normed in ([True] * 4, [True, True, False, False])
    is_usual = has_no_other and activation is not None and all(map(is_plain, linears))
    return is_usual and not _looks_at_positions(layer.get_submodule("self_attn"))


def _looks_at_positions(attention: nn.Module) -> bool:
    """Return whether attention does more with positions than to turn heads, perhaps only with late ones.

    Ministral 3 multiplies queries by what grows with each 16,384 tokens.
    """
    return "position_ids" in signature(attention.forward).parameters


def _pays(layer: nn.Module) -> bool:
    """Return whether layers with our products are faster than layers of modules with oneDNN's."""
    choice = fastest_packer()
    assert choice is not None
    weights = [_joined(layer, _QKV), *(_linear(layer, name).weight.detach() for name in _OTHERS)]
    return math.fsum(map(choice.lead, weights)) / len(weights) > -_GAIN


def _linear(layer: nn.Module, name: str) -> nn.Linear:
    linear = layer.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


def _joined(layer: nn.Module, names: tuple[str, ...]) -> Tensor:
    return torch.cat([_linear(layer, name).weight.detach() for name in names])


@torch.inference_mode()
def _recorded_calls(backbone: DecoderOnly, layers: ModuleList) -> list[_Call]:
    """Return what each layer got and gave in a small step of several sequences."""
    calls: list[_Call] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append(_Call(args[0] if args else None, kwargs, output))

    total = sum(_LENGTHS)
    cache = KVCache(
        backbone.kv_groups,
        [total + 1] * len(backbone.kv_groups),
        dtype=backbone.dtype,
        device=backbone.device,
    )
    slots = np.split(np.arange(1, total + 1), np.cumsum(_LENGTHS)[:-1])
    items = [PackedItem(0, len(each), (each,) * len(backbone.kv_groups)) for each in slots]
    positions = torch.cat([torch.arange(length) for length in _LENGTHS])
    ids = torch.arange(total) * 7919 % backbone.geometry.vocab_size
    hooks = [layer.register_forward_hook(record, with_kwargs=True) for layer in layers]
    try:
        backbone.forward(backbone.embed(ids), positions, backbone.plan(cache, items, np.arange(total)))
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _is_usual(call: _Call) -> bool:
    """Return whether a layer was called as `FusedLayers` is, with cosines and sines in bf16 too."""
    tensors = (call.hidden, call.output, *(call.arguments.get("position_embeddings") or ()))
    return len(tensors) == 4 and all(
        isinstance(each, Tensor) and each.dtype == torch.bfloat16 and each.ndim == 3 for each in tensors
    )


def _common_traits(backbone: DecoderOnly, layers: ModuleList, calls: list[_Call]) -> _Traits | None:
    """Return what all layers have in common; None: they differ, or the kernel doesn't take them."""
    geometries = backbone.geometry.layers[Site.DECODER_SELF]
    traits = {_traits(*each) for each in zip(layers, geometries, calls, strict=True)}
    return traits.pop() if len(traits) == 1 and _have_same_positions(calls) else None


def _traits(layer: nn.Module, geometry: LayerGeometry, call: _Call) -> _Traits | None:
    """Return what the kernel has to know of a layer; None: it doesn't take these sizes."""
    query, gate = _linear(layer, _QKV[0]), _linear(layer, _OTHERS[1])
    epsilon, activation = (
        epsilon_of(layer.get_submodule(_NORMS[0])),
        activation_of(layer.get_submodule(_ACTIVATION)),
    )
    assert epsilon is not None
    assert activation is not None
    shape = DecoderShape(
        hidden=query.in_features,
        heads=geometry.num_kv_heads * geometry.queries_per_kv,
        kv_heads=geometry.num_kv_heads,
        width=geometry.key_dim,
        rotary=call.arguments["position_embeddings"][0].shape[-1],
        inner=gate.out_features,
        activation=activation,
    )
    has_whole_vectors = all(
        size % _LANES == 0 for size in (shape.hidden, shape.width, shape.rotary // 2, shape.inner)
    )
    scaling = getattr(layer.get_submodule("self_attn"), "scaling", None)
    if not has_whole_vectors or shape.width != geometry.value_dim or shape.rotary > shape.width:
        return None
    return _Traits(shape, epsilon, scaling) if isinstance(scaling, float) else None


def _have_same_positions(calls: list[_Call]) -> bool:
    """Return whether all layers turn queries and keys alike."""
    first, *others = (call.arguments["position_embeddings"] for call in calls)
    return all(torch.equal(*pair) for other in others for pair in zip(first, other, strict=True))


@torch.inference_mode()
def _agrees(layer: nn.Module, number: int, traits: _Traits, call: _Call) -> bool:
    """Compare what the kernel makes of a call with what the layer made of it.

    Token by token: some models' first token is a thousand times as large as all others.
    """
    found = _fused([_packed(layer, Panels.pack)], [number], traits)(call.hidden, **call.arguments).float()
    hidden, output = call.hidden.float(), call.output.float()
    error, change, size = (each.norm(dim=-1) for each in (found - output, output - hidden, output))
    return bool((error <= _TOLERANCE * change + _ROUNDING * size).all())


def _fused(layers: list[DecoderLayer], numbers: Iterable[int], traits: _Traits) -> FusedLayers:
    return FusedLayers(layers, list(numbers), traits.shape, epsilon=traits.epsilon, scaling=traits.scaling)


def _packed(layer: nn.Module, pack: Callable[[Tensor, Tensor | None], Panels]) -> DecoderLayer:
    """Return a layer's weights as the kernel takes them."""
    parts = dict(layer.named_modules())
    output, gate, up, down = (
        pack(linear.weight, linear.bias) for linear in (_linear(layer, name) for name in _OTHERS)
    )
    norms = [cast(Tensor, parts[name].weight).detach() if name in parts else None for name in _NORMS]
    return DecoderLayer(
        pack(_joined(layer, _QKV), concatenated([_linear(layer, name) for name in _QKV])),
        output,
        Panels.gated(gate, up),
        down,
        tuple(norms),
    )
