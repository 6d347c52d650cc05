"""Whether a prompt fits the loaded base: decided before anything is stored, on numbers alone.

A prompt is cast to the base's dtype where it is used, so every value must be finite before and
after that cast: 3.4e38 is finite as float32 and infinite as bfloat16.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from app.errors import PromptRejected
from app.prompt import LayerGeometry, ModelGeometry, Prompt, PromptKind, TaskType
from app.sites import Embedding, Site, parse_prefix_tensor
from app.store.numbers import DTYPES, as_bytes, as_float32

_ROOM = 2  # a decoder's: one token of the user's, or its start, and one new one; a source's: a token and EOS
_SITES = {
    Site.ENCODER_SELF: "encoder self-attention",
    Site.DECODER_SELF: "decoder self-attention",
    Site.DECODER_CROSS: "decoder cross-attention",
}


def validate_prompt(prompt: Prompt, geometry: ModelGeometry) -> None:
    """Raise PromptRejected, with the tensor, what was expected and what was found, unless it fits."""
    _check_task_type(prompt, geometry)
    _check_room(prompt, geometry)
    if prompt.kind is PromptKind.SOFT:
        _check_width(prompt, geometry)
    else:
        _check_sites(prompt, geometry)
    for name in prompt.tensors:
        _check_finite(prompt, name, geometry.dtype)


def _check_task_type(prompt: Prompt, geometry: ModelGeometry) -> None:
    if geometry.has_encoder == (prompt.task_type is TaskType.SEQ_2_SEQ_LM):
        return
    expected, trained = TaskType.CAUSAL_LM, "for an encoder-decoder, and the base model is a decoder alone"
    if geometry.has_encoder:
        expected, trained = TaskType.SEQ_2_SEQ_LM, "for a decoder alone, and the base model has an encoder"
    raise PromptRejected(
        f"The prompt was trained {trained}", expected=f"task_type {expected}", found=prompt.task_type
    )


def _check_room(prompt: Prompt, geometry: ModelGeometry) -> None:
    in_decoder = max(prompt.length(place) for place in (Embedding.DECODER, Site.DECODER_SELF))
    if max(in_decoder, prompt.position_offset) + _ROOM > geometry.max_positions:
        raise _no_room("request", in_decoder, geometry.max_positions, "positions")
    in_encoder, limit = prompt.length(Embedding.ENCODER), geometry.max_source_positions
    if in_encoder and in_encoder + _ROOM > limit:
        raise _no_room("source", in_encoder, limit, "positions in its encoder")


def _no_room(what: str, length: int, limit: int, positions: str) -> PromptRejected:
    return PromptRejected(
        f"The prompt leaves no room for a {what}",
        expected=f"at most {limit - _ROOM} virtual tokens, as the base model has {limit} {positions}",
        found=f"{length} virtual tokens",
    )


def _check_width(prompt: Prompt, geometry: ModelGeometry) -> None:
    for name, info in prompt.tensors.items():
        if info.shape[-1] != geometry.hidden_size:
            raise PromptRejected(
                "The prompt's width is not the base model's hidden size",
                tensor=name,
                expected=f"[p, {geometry.hidden_size}]",
                found=str(list(info.shape)),
            )


def _check_sites(prompt: Prompt, geometry: ModelGeometry) -> None:
    if not geometry.takes_prefixes:
        raise PromptRejected(
            "The base model's cache holds something else than keys and values of each head, so no prefix can "
            "be put before its tokens; train a soft prompt"
        )
    for site in Site:
        if prompt.length(site):
            _check_layers(prompt, site, geometry.layers[site])
            _check_distances(prompt, site, geometry.layers[site])


def _check_layers(prompt: Prompt, site: Site, layers: tuple[LayerGeometry, ...]) -> None:
    parsed = (parse_prefix_tensor(name) for name in prompt.tensors)
    found = {parts.layer for parts in parsed if parts and parts.site is site}
    expected = range(len(layers))
    if found != set(expected):
        first = min(found.symmetric_difference(expected))
        raise PromptRejected(
            f"The prompt's layers are not those of the base model's {_SITES[site]}",
            tensor=site.tensor(first, "k"),
            expected=f"layers 0 to {len(expected) - 1}",
            found=f"{len(found)} layers, 0 to {max(found)}" if min(found) == 0 else f"{len(found)} layers",
        )
    for index, layer in enumerate(layers):
        _check_layer(prompt, site, index, layer)


def _check_layer(prompt: Prompt, site: Site, index: int, layer: LayerGeometry) -> None:
    for side, width in (("k", layer.key_dim), ("v", layer.value_dim)):
        name = site.tensor(index, side)
        expected = (layer.num_kv_heads, prompt.length(site), width)
        if prompt.tensors[name].shape != expected:
            raise PromptRejected(
                f"The prompt's heads are not those of the base model's {_SITES[site]} in layer {index}",
                tensor=name,
                expected=f"[heads, virtual tokens, width] = {list(expected)}",
                found=str(list(prompt.tensors[name].shape)),
            )


def _check_distances(prompt: Prompt, site: Site, layers: tuple[LayerGeometry, ...]) -> None:
    """Refuse keys without a position where scores get a bias by the distance of key and query."""
    if not any(layer.has_position_bias for layer in layers):
        return
    if site is Site.ENCODER_SELF:
        expected = "a prefix in the decoder alone, or a soft prompt"
    elif site is Site.DECODER_SELF and prompt.position_offset == 0:
        expected = f"position_offset.dec {prompt.length(site)}, as PEFT's prefixes have it"
    else:
        return
    raise PromptRejected(
        f"The prefix has no defined relative bias: the base model's {_SITES[site]} adds one by the distance "
        "of key and query, and the prefix is at no position",
        tensor=site.tensor(0, "k"),
        expected=expected,
        found="tokens that begin at position 0, as without a prefix",
    )


def _check_finite(prompt: Prompt, name: str, dtype: str) -> None:
    info = prompt.tensors[name]
    values = as_float32(prompt.tensor_bytes(name), info.dtype)
    for what, bad in _non_finite(values, dtype):
        if bad.any():
            where = int(bad.argmax())
            index = [int(i) for i in np.unravel_index(where, info.shape)]
            raise PromptRejected(
                what, tensor=name, expected="finite numbers", found=f"{values[where]} at {index}"
            )


def _non_finite(values: NDArray[np.float32], dtype: str) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    yield "The prompt holds NaN or infinity", ~np.isfinite(values)
    yield f"A number overflows in the base model's {dtype}", _overflows(values, dtype)


def _overflows(values: NDArray[np.float32], dtype: str) -> NDArray[np.bool_]:
    """Return which finite values become infinite when they are rounded to `dtype`."""
    rounded = as_bytes(values, DTYPES[dtype])
    return np.isinf(as_float32(memoryview(rounded), DTYPES[dtype]))
