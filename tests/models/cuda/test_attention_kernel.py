"""The kernels give what torch gives, for all shapes and flags; without a GPU in the interpreter."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from app.models.attention.backend import Context
from app.models.attention.torch import TorchBackend
from app.models.attention.triton import TritonBackend, TritonLayout
from app.prompt import LayerGeometry
from tests.models.cuda.interpreted import hand_made_layout

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Case:
    """Contexts over permuted slots, and the numbers that a layer gets."""

    def __init__(self, geometry: LayerGeometry, lengths: Sequence[tuple[int, int]], seed: int = 0) -> None:
        torch.manual_seed(seed)
        rng = np.random.default_rng(seed)
        self.geometry = geometry
        num_slots = 1 + sum(slots for _, slots in lengths)
        order = 1 + rng.permutation(num_slots - 1)
        ends = np.cumsum([slots for _, slots in lengths])
        self.contexts = [
            Context(tokens, order[end - slots : end])
            for (tokens, slots), end in zip(lengths, ends, strict=True)
        ]
        num_tokens = sum(tokens for tokens, _ in lengths)
        heads = geometry.num_kv_heads * geometry.queries_per_kv
        self.query = torch.randn(num_tokens, heads, geometry.key_dim).transpose(0, 1)
        widths = (geometry.key_dim, geometry.value_dim)
        self.pools = [torch.randn(num_slots, geometry.num_kv_heads * width) for width in widths]
        self.pools[0][0], self.pools[1][0] = 0, 0
        self.sinks = torch.randn(heads) if geometry.has_sinks else None
        self.bias = torch.randn(heads, 2 * 9 + 1) if geometry.has_position_bias else None

    def run(self, backend: Any, layout: Any, dtype: torch.dtype) -> Tensor:
        own = [context.slots[-context.num_tokens :] for context in self.contexts]
        written = torch.from_numpy(np.concatenate(own))
        keys, values = (
            pool[written].view(len(written), self.geometry.num_kv_heads, -1).transpose(0, 1).to(DEVICE, dtype)
            for pool in self.pools
        )
        return backend.forward(
            self.query.to(DEVICE, dtype),
            keys,
            values,
            tuple(pool.to(DEVICE, dtype) for pool in self.pools),
            layout,
            scaling=0.3,
            softcap=self.geometry.softcap,
            sinks=self.sinks,
            position_bias=self.bias,
        )

    def expected(self) -> Tensor:
        backend = TorchBackend(self.geometry, torch.float32, DEVICE)
        return self.run(backend, backend.plan(self.contexts), torch.float32)

    def found(self, layout: TritonLayout, dtype: torch.dtype) -> Tensor:
        return self.run(TritonBackend(self.geometry, dtype, DEVICE), layout, dtype)


STEP = [(1, 1), (1, 130), (1, 64), (5, 5), (40, 70), (3, 100)]


@pytest.mark.parametrize(
    "geometry",
    [
        LayerGeometry(2, 16, 16),
        LayerGeometry(1, 80, 80, queries_per_kv=3),
        LayerGeometry(2, 24, 16, queries_per_kv=7),
        LayerGeometry(1, 16, 112, queries_per_kv=12, softcap=20.0),
        LayerGeometry(2, 16, 16, queries_per_kv=2, has_sinks=True),
        LayerGeometry(2, 16, 16, has_position_bias=True),
        LayerGeometry(2, 16, 16, is_causal=False, has_position_bias=True),
    ],
)
def test_kernels_agree_with_torch(geometry: LayerGeometry) -> None:
    case = Case(geometry, STEP)
    layout = hand_made_layout(
        case.contexts, geometry, torch.float32, splits=[1, 3], num_empty=2, device=DEVICE
    )
    torch.testing.assert_close(case.found(layout, torch.float32), case.expected(), rtol=1e-4, atol=1e-5)
