"""Attention steps that kernels are compared on: geometries, contexts in permuted slots, shared prefixes."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from app.models.attention.backend import AttentionBackend, Context, Head
from app.models.attention.kv_cache import PADDING_SLOT
from app.prompt import LayerGeometry

_POSITIONS = 64  # a bias by position has this many distances on each side


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One step of one layer."""

    name: str
    geometry: LayerGeometry
    rows: tuple[int, ...] = ()  # slots of contexts of one token
    chunks: tuple[tuple[int, int], ...] = ()  # (tokens, slots)
    prefix: int = 0  # slots that all contexts begin with
    has_own: bool = True  # False: cross-attention

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.rows) + sum(tokens for tokens, _ in self.chunks)

    @property
    def kv_slots(self) -> int:
        """Slots that are read at least: a shared prefix counts once."""
        lengths = [*self.rows, *(slots for _, slots in self.chunks)]
        return sum(lengths) - self.prefix * (len(lengths) - 1)


@dataclass(frozen=True, slots=True)
class Inputs:
    """Random numbers for a case: query `[H, T, D]`, key and value `[Hk, T, D]`, pools `[S, Hk * D]`."""

    query: Tensor
    key: Tensor
    value: Tensor
    pools: tuple[Tensor, Tensor]
    contexts: tuple[Context, ...]
    sinks: Tensor | None
    position_bias: Tensor | None

    def to(self, dtype: torch.dtype) -> "Inputs":
        """Return the same numbers in another dtype."""
        keys, values = self.pools
        return replace(
            self,
            query=self.query.to(dtype),
            key=self.key.to(dtype),
            value=self.value.to(dtype),
            pools=(keys.to(dtype), values.to(dtype)),
            sinks=None if self.sinks is None else self.sinks.to(dtype),
            position_bias=None if self.position_bias is None else self.position_bias.to(dtype),
        )


_ANY = LayerGeometry(num_kv_heads=1, key_dim=1, value_dim=1)  # of a step, which every kind of layer takes
_SMALL = LayerGeometry(num_kv_heads=2, key_dim=64, value_dim=64, queries_per_kv=7)  # Qwen2 0.5B
KINDS = {
    "GQA 7 x 64": _SMALL,
    "window, soft cap": replace(_SMALL, window=16, softcap=30.0),
    "sinks": replace(_SMALL, has_sinks=True),
    "not causal": replace(_SMALL, is_causal=False),
    "T5": replace(_SMALL, queries_per_kv=1, has_position_bias=True),
    "T5's encoder": replace(_SMALL, queries_per_kv=1, has_position_bias=True, is_causal=False),
    "GQA 4 x 128": LayerGeometry(num_kv_heads=8, key_dim=128, value_dim=128, queries_per_kv=4),
    "GQA 2 x 256": LayerGeometry(num_kv_heads=4, key_dim=256, value_dim=256, queries_per_kv=2),
    "heads of 80": LayerGeometry(num_kv_heads=4, key_dim=80, value_dim=80),
    "keys 192, values 128": LayerGeometry(num_kv_heads=4, key_dim=192, value_dim=128),
    "one kv head": LayerGeometry(num_kv_heads=1, key_dim=128, value_dim=128, queries_per_kv=32),
}
TINY_KINDS = tuple(KINDS)[:6]


def cases(kinds: Collection[str], *, is_tiny: bool = False) -> Iterator[Case]:
    """Yield these kinds of layers on rows, chunks, both, and neighbours that share a prefix."""
    for kind, step in product(kinds, _tiny_steps() if is_tiny else _steps()):
        geometry = KINDS[kind]
        if is_tiny:
            queries = min(2, geometry.queries_per_kv)
            geometry = replace(geometry, key_dim=16, value_dim=16, queries_per_kv=queries)
        if step.has_own or not (geometry.is_causal or geometry.has_position_bias):
            yield replace(step, name=f"{kind}, {step.name}", geometry=geometry)


def _steps() -> Iterator[Case]:
    lengths = (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 300, 1000, 5000)
    yield Case(name="rows", geometry=_ANY, rows=lengths)
    yield Case(name="64 rows", geometry=_ANY, rows=(257,) * 64)
    yield Case(name="rows on a prefix", geometry=_ANY, rows=tuple(range(520, 552)), prefix=500)
    yield Case(name="chunks", geometry=_ANY, chunks=((2, 2), (17, 17), (64, 564), (300, 1300)))
    yield Case(name="rows and chunks", geometry=_ANY, rows=(9, 700), chunks=((33, 90), (130, 130)))
    yield Case(name="cross", geometry=_ANY, rows=(1, 40, 333), chunks=((20, 77),), has_own=False)


def _tiny_steps() -> Iterator[Case]:
    yield Case(name="rows on a prefix", geometry=_ANY, rows=(1 + 20, 3 + 20, 60), prefix=20)
    yield Case(name="rows and chunks", geometry=_ANY, rows=(9,), chunks=((5, 5), (18, 30)))
    yield Case(name="cross", geometry=_ANY, rows=(7,), chunks=((3, 20),), has_own=False)


def inputs_of(case: Case, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
    """Return random inputs of a step, whose keys and values lie in a random order."""
    geometry, generator = case.geometry, torch.Generator(device).manual_seed(seed)
    heads = geometry.num_kv_heads * geometry.queries_per_kv
    contexts = _contexts(case, np.random.default_rng(seed))
    num_slots = 1 + max(int(each.slots.max()) for each in contexts)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    keys = random(num_slots, geometry.num_kv_heads * geometry.key_dim)
    values = random(num_slots, geometry.num_kv_heads * geometry.value_dim)
    keys[PADDING_SLOT], values[PADDING_SLOT] = 0, 0
    own = torch.from_numpy(_own_slots(contexts, num_slots)).to(device)
    return Inputs(
        random(heads, case.num_tokens, geometry.key_dim),
        keys[own].view(case.num_tokens, geometry.num_kv_heads, -1).transpose(0, 1).contiguous(),
        values[own].view(case.num_tokens, geometry.num_kv_heads, -1).transpose(0, 1).contiguous(),
        (keys, values),
        contexts,
        random(heads) if geometry.has_sinks else None,
        random(heads, 2 * _POSITIONS + 1) if geometry.has_position_bias else None,
    )


def attend(backend: AttentionBackend[Any], case: Case, inputs: Inputs, layout: Any) -> Tensor:
    """Run a backend on a planned step; return `[T, H, Dv]`."""
    return backend.forward(
        inputs.query,
        inputs.key,
        inputs.value,
        inputs.pools,
        layout,
        scaling=case.geometry.key_dim**-0.5,
        softcap=case.geometry.softcap,
        sinks=inputs.sinks,
        position_bias=inputs.position_bias,
    )


def _contexts(case: Case, rng: np.random.Generator) -> tuple[Context, ...]:
    """Lay out contexts in slots that nobody else has but for the prefix; windows hide what can't be seen."""
    lengths = [(1, slots) for slots in case.rows] + list(case.chunks)
    free = 1 + rng.permutation(case.kv_slots + 7)  # slot 0 is padding
    prefix, begin = free[: case.prefix], case.prefix
    contexts = []
    for tokens, slots in lengths:
        own = slots - case.prefix
        mine = np.concatenate([prefix, free[begin : begin + own]])
        begin += own
        window = case.geometry.window
        seen = slots if window is None else min(slots, tokens - 1 + window)
        heads = (Head(1, case.prefix),) if case.prefix and window is None else ()
        contexts.append(Context(tokens, np.ascontiguousarray(mine[slots - seen :]), case.has_own, heads))
    return tuple(contexts)


def _own_slots(contexts: Sequence[Context], num_slots: int) -> NDArray[np.int64]:
    """Return where the tokens' own keys lie; any slots where they have none."""
    own = [
        each.slots[-each.num_tokens :] if each.has_own else np.resize(each.slots, each.num_tokens)
        for each in contexts
    ]
    return np.concatenate(own)
