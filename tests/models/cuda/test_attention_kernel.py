"""The kernels give what torch gives, for all shapes and flags; without a GPU in the interpreter."""

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.models.attention.agreement import (
    TOLERANCE,
    attention_of,
    checked_step,
    inputs_of,
    relative_error,
    seen,
)
from app.models.attention.backend import Context
from app.models.attention.torch import TorchBackend
from app.models.attention.triton import TritonBackend
from app.models.cuda.blocks import queries_per_tile
from app.prompt import LayerGeometry
from tests.models.cuda.interpreted import hand_made_layout

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WIDTHS = [(16, 16), (12, 12), (24, 16), (80, 80), (96, 96), (112, 112), (192, 128), (16, 40)]
SHORT = st.one_of(st.integers(0, 20), st.integers(60, 70))
LONG = st.one_of(SHORT, st.integers(100, 600))
CHEAP = settings(
    max_examples=16,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


class Step(NamedTuple):
    """What hypothesis draws."""

    geometry: LayerGeometry
    dtype: torch.dtype
    contexts: list[Context]
    num_slots: int
    splits: list[int]
    num_empty: int


@st.composite
def geometries(draw: st.DrawFn) -> LayerGeometry:
    key_dim, value_dim = draw(st.sampled_from(WIDTHS))
    kind = draw(st.sampled_from(["plain", "softcap", "sinks", "both", "bias"]))
    is_causal = draw(st.sampled_from([True, True, False]))
    return LayerGeometry(
        draw(st.integers(1, 2)),
        key_dim,
        value_dim,
        window=draw(st.sampled_from([None, 1, 7, 100])) if is_causal else None,
        queries_per_kv=draw(st.sampled_from([1, 2, 3, 7, 12, 20])),
        softcap=draw(st.sampled_from([1.0, 30.0])) if kind in {"softcap", "both"} else None,
        has_sinks=kind in {"sinks", "both"},
        is_causal=is_causal,
        has_position_bias=kind == "bias",
    )


@st.composite
def drawn_steps(draw: st.DrawFn, sizes: st.SearchStrategy[int], max_tiles: int) -> Step:
    """Rows, then chunks, some on one of two prefixes, over permuted slots; or tokens that read sources."""
    geometry, dtype = draw(geometries()), draw(st.sampled_from(list(TOLERANCE)))
    is_cross = not geometry.is_causal and draw(st.booleans())
    tile = queries_per_tile(geometry, dtype)
    lengths = [(1, draw(sizes)) for _ in range(draw(st.integers(0, 3)))]
    num_chunks = draw(st.integers(0 if lengths else 1, 2))
    lengths += [(draw(st.integers(2, max(max_tiles * tile, 2))), draw(sizes)) for _ in range(num_chunks)]
    order = np.random.default_rng(draw(st.integers(0, 9))).permutation(np.arange(1, 9000))
    free = iter(order)
    prefixes = [np.fromiter(free, np.int64, draw(sizes)) for _ in range(2)]
    contexts = []
    for tokens, length in lengths:
        prefix = draw(st.sampled_from([*prefixes, prefixes[0][:0]]))
        own = max(length, 1) if is_cross else tokens + length
        slots = np.concatenate([prefix, np.fromiter(free, np.int64, own)])
        contexts.append(seen(Context(tokens, slots, not is_cross), geometry.window))
    return Step(
        geometry,
        dtype,
        contexts,
        len(order) + 1,
        draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)),
        draw(st.integers(0, 3)),
    )


def check(step: Step) -> None:
    """Compare with torch, over pools in which every slot that no context has is NaN."""
    geometry, dtype = step.geometry, step.dtype
    inputs = inputs_of(geometry, step.contexts, step.num_slots, torch.Generator().manual_seed(0))
    inputs = inputs.to(DEVICE, dtype)
    expected = attention_of(
        TorchBackend(geometry, torch.float32, DEVICE),
        geometry,
        step.contexts,
        inputs.to(DEVICE, torch.float32),
    )
    layout = hand_made_layout(
        step.contexts, geometry, dtype, splits=step.splits, num_empty=step.num_empty, device=DEVICE
    )
    backend = TritonBackend(geometry, dtype, DEVICE)
    found = attention_of(backend, geometry, step.contexts, inputs, layout)
    assert found.dtype == dtype
    assert relative_error(found, expected) < TOLERANCE[dtype]


@CHEAP
@given(step=drawn_steps(SHORT, 2))
def test_kernels_agree_with_torch(step: Step) -> None:
    check(step)


@pytest.mark.soak
@settings(CHEAP, max_examples=60)
@given(step=drawn_steps(LONG, 5))
def test_kernels_agree_with_torch_on_larger_steps(step: Step) -> None:
    check(step)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("splits", [1, 7])
def test_a_row_reads_thousands_of_keys(dtype: torch.dtype, splits: int) -> None:
    geometry = LayerGeometry(1, 16, 16, queries_per_kv=7)
    contexts = [Context(1, np.random.default_rng(0).permutation(np.arange(1, 5001)))]
    check(Step(geometry, dtype, contexts, 5100, [splits], 0))


def test_keys_and_values_of_a_step_may_be_parts_of_one_projection() -> None:
    """An encoder's rows are read where its layers left them."""
    geometry = LayerGeometry(2, 16, 16, is_causal=False)
    contexts = [Context(9, np.arange(9))]
    inputs = inputs_of(geometry, contexts, 9, torch.Generator().manual_seed(0)).to(DEVICE, torch.float32)
    keys, values = torch.randn(9, 3 * 32, device=DEVICE)[:, 32:].split(32, dim=1)
    backend = TritonBackend(geometry, torch.float32, DEVICE)
    layout = hand_made_layout(contexts, geometry, torch.float32, device=DEVICE)
    found, expected = (
        attention_of(backend, geometry, contexts, inputs._replace(pools=pools), layout)
        for pools in ((keys, values), (keys.contiguous(), values.contiguous()))
    )
    assert torch.equal(found, expected)


class Recorder:
    """Stands in for a kernel, and keeps what it is launched with."""

    def __init__(self) -> None:
        self.given: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *given, **constants: self.given.extend(given)


@pytest.mark.parametrize("kv_heads", [1, 7])
def test_a_geometry_is_compiled_once(kv_heads: int) -> None:
    """Triton compiles another kernel for addresses and strides that aren't multiples of 16, amid serving."""
    geometry = LayerGeometry(kv_heads, 16, 16)
    contexts, inputs = checked_step(geometry, has_own=True)
    backend = TritonBackend(geometry, torch.bfloat16, torch.device("cpu"))
    kernel = Recorder()
    backend._attend_rows._kernel = backend._attend_tiles._kernel = backend._merge = kernel
    for count in (1, 5, len(contexts)):
        attention_of(
            backend,
            geometry,
            contexts[:count],
            inputs.to(torch.device("cpu"), torch.bfloat16),
        )
    tensors = [each for each in kernel.given if isinstance(each, torch.Tensor)]
    numbers = [each for each in kernel.given if isinstance(each, int)]
    assert len(tensors) > 30
    assert not [each.shape for each in tensors if each.data_ptr() % 16]
    assert not [each for each in numbers if each % 16]


def test_far_slots_are_found() -> None:
    """Numbers of a pool are counted in 64 bits: this one has more than 2**31 of them."""
    geometry = LayerGeometry(1, 16, 16)
    kernel = TritonBackend(geometry, torch.float16, DEVICE)
    far = (1 << 31) // 16 + 5
    # Memory that is never touched isn't taken.
    pool = torch.empty(far + 1, 16, dtype=torch.float16, device=DEVICE)
    query = torch.randn(1, 1, 16, device=DEVICE).half()
    context = Context(1, np.array([far]))
    pool[far] = torch.arange(16)
    layout = hand_made_layout([context], geometry, torch.float16, device=DEVICE)
    found = kernel.forward(
        query,
        query,
        query,
        (pool, pool),
        layout,
        scaling=1.0,
        softcap=None,
        sinks=None,
        position_bias=None,
    )
    assert torch.equal(found[0, 0].cpu(), torch.arange(16).half())
