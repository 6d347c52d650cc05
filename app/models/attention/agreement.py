"""Whether a backend computes on this device what torch computes: compilers and drivers can be wrong.

A step of all kinds of contexts over permuted slots, in which all slots that nothing may read are NaN.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from app.models.attention.backend import AttentionBackend, Context, Head
from app.models.attention.kv_cache import PADDING_SLOT
from app.models.attention.torch import TorchBackend
from app.prompt import LayerGeometry

# Largest relative error of one head's output for one token, against float32: rounding to the dtype, no more.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
# Tokens and slots: rows and chunks around the kernels' blocks, and long enough to be split.
_OWN = [(1, 1), (1, 63), (1, 200), (1, 1500), (2, 2), (70, 70), (5, 129), (150, 700)]
_CROSS = [(1, 1), (1, 300), (9, 3), (70, 40), (1, 1100)]
_HEAD_SLOTS, _HEAD_ROWS = 512, 6
_UNUSED = 100  # slots that no context has
_MAX_DISTANCE = 20  # of position biases


MakeBackend = Callable[[LayerGeometry, torch.dtype, torch.device], AttentionBackend[Any]]


class Inputs(NamedTuple):
    """What `AttentionBackend.forward` gets of one layer."""

    query: Tensor
    key: Tensor
    value: Tensor
    pools: tuple[Tensor, Tensor]
    sinks: Tensor | None
    position_bias: Tensor | None

    def to(self, device: torch.device, dtype: torch.dtype) -> "Inputs":
        """Move all to the device. Biases stay in float32, in which a model computes them."""
        sinks = None if self.sinks is None else self.sinks.to(device, dtype)
        bias = None if self.position_bias is None else self.position_bias.to(device)
        query, key, value, *pools = (
            each.to(device, dtype) for each in (self.query, self.key, self.value, *self.pools)
        )
        return Inputs(query, key, value, (pools[0], pools[1]), sinks, bias)


def error_of(
    backend: MakeBackend, geometry: LayerGeometry, dtype: torch.dtype, device: torch.device
) -> float:
    """Return the backend's largest relative error against torch's in float32; NaN counts as infinite."""
    errors = [0.0]
    # Cross-attention has no distances.
    for has_own in (True,) if geometry.is_causal or geometry.has_position_bias else (True, False):
        contexts, inputs = checked_step(geometry, has_own=has_own)
        inputs = inputs.to(device, dtype)
        reference = TorchBackend(geometry, torch.float32, device)
        expected = attention_of(reference, geometry, contexts, inputs.to(device, torch.float32))
        found = attention_of(backend(geometry, dtype, device), geometry, contexts, inputs)
        errors.append(relative_error(found, expected))
    return max(errors)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest relative error of one head's output for one token; NaN counts as infinite."""
    error = (found.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    return float(error.nan_to_num(float("inf")).max())


def checked_step(geometry: LayerGeometry, *, has_own: bool) -> tuple[list[Context], Inputs]:
    """Return contexts, rows first, and a layer's numbers, on the CPU in float32."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    lengths = _OWN if has_own else _CROSS
    num_slots = sum(slots for _, slots in lengths) + _HEAD_SLOTS + _HEAD_ROWS + _UNUSED
    free = iter(1 + rng.permutation(num_slots - 1))

    def take(count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.fromiter(free, np.int64, count)

    contexts = [Context(tokens, take(slots), has_own) for tokens, slots in lengths]
    if has_own and geometry.is_causal:
        head = take(_HEAD_SLOTS)
        heads = (Head(1, _HEAD_SLOTS),)
        sharing = [
            Context(1, np.concatenate([head, take(number)]), heads=heads) for number in range(1, _HEAD_ROWS)
        ]
        contexts = [*contexts[:4], *sharing, *contexts[4:]]
        contexts = [seen(context, geometry.window) for context in contexts]
    return contexts, inputs_of(geometry, contexts, num_slots, generator)


def seen(context: Context, window: int | None) -> Context:
    """Return the context without the slots that left the window of all of its tokens."""
    hidden = 0 if window is None else max(len(context.slots) - (context.num_tokens - 1 + window), 0)
    return context if not hidden else Context(context.num_tokens, context.slots[hidden:])


def inputs_of(
    geometry: LayerGeometry, contexts: Sequence[Context], num_slots: int, generator: torch.Generator
) -> Inputs:
    """Return random numbers for contexts; slots that none of them has are NaN."""
    num_tokens = sum(context.num_tokens for context in contexts)
    kv_heads, heads = geometry.num_kv_heads, geometry.num_kv_heads * geometry.queries_per_kv
    named = torch.from_numpy(np.unique(np.concatenate([context.slots for context in contexts])))

    def pool(width: int) -> Tensor:
        rows = torch.full((num_slots, kv_heads * width), float("nan"))
        rows[named] = torch.randn(len(named), kv_heads * width, generator=generator)
        rows[PADDING_SLOT] = 0
        return rows

    pools = pool(geometry.key_dim), pool(geometry.value_dim)
    own = [context.slots[-context.num_tokens :] for context in contexts if context.has_own]
    written = torch.from_numpy(np.concatenate([*own, np.empty(0, np.int64)]))
    key, value = (
        each[written].view(len(written), kv_heads, each.shape[1] // kv_heads).transpose(0, 1)
        for each in pools
    )
    query = torch.randn(num_tokens, heads, geometry.key_dim, generator=generator).transpose(0, 1)
    sinks = torch.randn(heads, generator=generator) if geometry.has_sinks else None
    table = torch.randn(heads, 2 * _MAX_DISTANCE + 1, generator=generator)
    return Inputs(query, key, value, pools, sinks, table if geometry.has_position_bias else None)


def attention_of(
    backend: AttentionBackend[Any],
    geometry: LayerGeometry,
    contexts: Sequence[Context],
    inputs: Inputs,
    layout: Any = None,  # None: the backend's own plan of the contexts
) -> Tensor:
    """Return what the backend computes, `[T, H, Dv]`."""
    return backend.forward(
        inputs.query,
        inputs.key,
        inputs.value,
        inputs.pools,
        backend.plan(contexts) if layout is None else layout,
        scaling=geometry.key_dim**-0.5,
        softcap=geometry.softcap,
        sinks=inputs.sinks,
        position_bias=inputs.position_bias,
    )
