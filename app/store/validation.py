"""Whether a prompt fits the loaded base: decided before anything is stored, on numbers alone.

A prompt is cast to the base's dtype where it is used, so every value must be finite before and
after that cast: 3.4e38 is finite as float32 and infinite as bfloat16.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from app.errors import PromptRejected
from app.prompt import LayerGeometry, ModelGeometry, Prompt, PromptKind
from app.sites import Site, parse_prefix_tensor
from app.store.numbers import DTYPES, as_bytes, as_float32

_ROOM = 2  # one token of the user's and one new one


def validate_prompt(prompt: Prompt, geometry: ModelGeometry) -> None:
    """Raise PromptRejected, with the tensor, what was expected and what was found, unless it fits."""
    _check_room(prompt, geometry)
    if prompt.kind is PromptKind.SOFT:
        _check_width(prompt, geometry)
    elif geometry.takes_prefixes:
        _check_layers(prompt, geometry)
    else:
        raise PromptRejected(
            "The base model's cache holds something else than keys and values of each head, so no prefix can "
            "be put before its tokens; train a soft prompt"
        )
    for name in prompt.tensors:
        _check_finite(prompt, name, geometry.dtype)


def _check_room(prompt: Prompt, geometry: ModelGeometry) -> None:
    needed = max(prompt.num_virtual_tokens, prompt.position_offset) + _ROOM
    if needed > geometry.max_positions:
        raise PromptRejected(
            "The prompt leaves no room for a request",
            expected=f"at most {geometry.max_positions - _ROOM} virtual tokens, as the base model has "
            f"{geometry.max_positions} positions",
            found=f"{prompt.num_virtual_tokens} virtual tokens",
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


def _check_layers(prompt: Prompt, geometry: ModelGeometry) -> None:
    found = {parts.layer for name in prompt.tensors if (parts := parse_prefix_tensor(name))}
    layers = geometry.layers[Site.DECODER_SELF]
    expected = range(len(layers))
    if found != set(expected):
        first = min(found.symmetric_difference(expected))
        raise PromptRejected(
            "The prompt's layers are not the base model's",
            tensor=Site.DECODER_SELF.tensor(first, "k"),
            expected=f"layers 0 to {len(expected) - 1}",
            found=f"{len(found)} layers, 0 to {max(found)}" if min(found) == 0 else f"{len(found)} layers",
        )
    for index, layer in enumerate(layers):
        _check_layer(prompt, index, layer)


def _check_layer(prompt: Prompt, index: int, layer: LayerGeometry) -> None:
    for side, width in (("k", layer.key_dim), ("v", layer.value_dim)):
        name = Site.DECODER_SELF.tensor(index, side)
        expected = (layer.num_kv_heads, prompt.num_virtual_tokens, width)
        if prompt.tensors[name].shape != expected:
            raise PromptRejected(
                "The prompt's heads are not the base model's",
                tensor=name,
                expected=f"[heads, virtual tokens, width] = {list(expected)}",
                found=str(list(prompt.tensors[name].shape)),
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
