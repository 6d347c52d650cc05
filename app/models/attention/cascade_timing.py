"""From where on rows that share slots pay on this very device, by timing steps of both kinds."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from app.models.attention.backend import AttentionBackend, Context, Head
from app.models.attention.cascade import CascadeCosts
from app.prompt import LayerGeometry

Work = Callable[[], None]

_DEFAULT_FIXED = 20_000.0  # keys: where sharing was found to pay from 8,000 to 20,000 on
_ROWS, _SHARED_SLOTS, _OWN_SLOTS = (4, 16, 64), (256, 1024, 4096), 64
_POOL_BYTES = 128 << 20  # of all layers together: more than an H100's or H200's cache of 50 MiB holds
_MIN_SPEEDUP = 1.05  # less isn't told from noise
_NUM_ROUNDS = 5


def default_costs(geometry: LayerGeometry, dtype: torch.dtype) -> CascadeCosts:
    """Return the bytes of a partial result, written and read in float32, in bytes of a key and its value."""
    partial = geometry.queries_per_kv * (geometry.value_dim + 2) * 2 * torch.float32.itemsize
    return CascadeCosts(partial / ((geometry.key_dim + geometry.value_dim) * dtype.itemsize), _DEFAULT_FIXED)


def measured_fixed(
    geometry: LayerGeometry,
    dtype: torch.dtype,
    device: torch.device,
    alone: AttentionBackend[Any],
    sharing: AttentionBackend[Any],
    gain: Callable[[Sequence[Context]], float],
    seconds: Callable[[Work], float],
) -> float:
    """Return the least gain from which on sharing paid; infinite: it didn't where most is shared.

    `alone` never shares, `sharing` always does. `seconds` tells how long a piece of work takes.
    """
    layers = _Layers(geometry, dtype, device)
    unpaid, paid = [0.0], [float("inf")]
    for num_rows in _ROWS:
        for num_shared in _SHARED_SLOTS:
            contexts = _rows(num_rows, num_shared)
            times = [seconds(layers.work(backend, contexts)) for backend in (alone, sharing)]
            (paid if times[0] > times[1] * _MIN_SPEEDUP else unpaid).append(gain(contexts))
    return min(each for each in paid if each > max(unpaid))


def device_seconds(work: Work) -> float:
    """Return how long a GPU takes for what `work` launches, without the host's part: as a graph."""
    work()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    times: list[float] = []
    for _ in range(_NUM_ROUNDS):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(float(begin.elapsed_time(end)) / 1000)
    return min(times)


class _Layers:
    """Keys and values of several layers: a layer's have left the device's cache when its turn comes again."""

    def __init__(self, geometry: LayerGeometry, dtype: torch.dtype, device: torch.device) -> None:
        self._geometry, self._dtype, self._device = geometry, dtype, device
        num_slots = 1 + max(_SHARED_SLOTS) + max(_ROWS) * _OWN_SLOTS
        num_layers = -(-_POOL_BYTES // (num_slots * geometry.kv_width * dtype.itemsize))
        self._pools = [
            (
                self._numbers(num_slots, heads * geometry.key_dim),
                self._numbers(num_slots, heads * geometry.value_dim),
            )
            for heads in (geometry.num_kv_heads,) * num_layers
        ]

    def _numbers(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self._dtype, device=self._device)

    def work(self, backend: AttentionBackend[Any], contexts: Sequence[Context]) -> Work:
        """Return attention of a decode step in all layers."""
        geometry, layout = self._geometry, backend.plan(contexts)
        heads = geometry.num_kv_heads * geometry.queries_per_kv
        query = self._numbers(len(contexts), heads, geometry.key_dim).transpose(0, 1)
        key = self._numbers(geometry.num_kv_heads, len(contexts), geometry.key_dim)
        value = self._numbers(geometry.num_kv_heads, len(contexts), geometry.value_dim)
        sinks = self._numbers(heads) if geometry.has_sinks else None

        def work() -> None:
            for pools in self._pools:
                backend.forward(
                    query,
                    key,
                    value,
                    pools,
                    layout,
                    scaling=1.0,
                    softcap=geometry.softcap,
                    sinks=sinks,
                    position_bias=None,
                )

        return work


def _rows(num_rows: int, num_shared: int) -> list[Context]:
    """Return rows over permuted slots, which share all but a few."""
    slots = 1 + np.random.default_rng(0).permutation(num_shared + num_rows * _OWN_SLOTS)
    head, own = slots[:num_shared], slots[num_shared:].reshape(num_rows, -1)
    return [Context(1, np.concatenate([head, each]), heads=(Head(1, num_shared),)) for each in own]
