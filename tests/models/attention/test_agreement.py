"""A backend serves where it computes what torch computes, and torch's serves in its place otherwise."""

import ast
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import app
from app.models.attention import agreement
from app.models.attention.agreement import TOLERANCE, error_of
from app.models.attention.cascade import ALWAYS
from app.models.attention.registry import choose_backend
from app.models.attention.torch import TorchBackend
from app.models.attention.triton import TritonBackend
from app.prompt import LayerGeometry

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GEOMETRIES = [
    LayerGeometry(2, 16, 24, queries_per_kv=3),
    LayerGeometry(2, 16, 16, queries_per_kv=2, window=100, softcap=20.0),
    LayerGeometry(2, 16, 16, queries_per_kv=2, has_sinks=True),
    LayerGeometry(2, 16, 16, has_position_bias=True),
    LayerGeometry(2, 16, 16, is_causal=False, has_position_bias=True),
    LayerGeometry(2, 16, 16, is_causal=False),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_rounding_alone_is_agreement(geometry: LayerGeometry, dtype: torch.dtype) -> None:
    assert error_of(TorchBackend, geometry, dtype, CPU) < TOLERANCE[dtype]


class Careless(TorchBackend):
    """Hides one key too many of every window, or forgets what bounds and biases scores."""

    def __init__(self, geometry: LayerGeometry, *given: Any) -> None:
        super().__init__(geometry, *given)
        self._window = geometry.window and geometry.window - 1

    def forward(self, *given: Any, **scores: Any) -> Tensor:
        scores["position_bias"] = None if scores["position_bias"] is None else scores["position_bias"] * 0.9
        scores["softcap"] = scores["softcap"] and scores["softcap"] * 2
        scores["sinks"] = None if scores["sinks"] is None else scores["sinks"] + 0.5
        scores["scaling"] *= 1.0 if self._has_position_bias else 1.1
        return super().forward(*given, **scores)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_wrong_scores_are_none(geometry: LayerGeometry, dtype: torch.dtype) -> None:
    assert error_of(Careless, geometry, dtype, CPU) > TOLERANCE[dtype]


class Poisoned(TorchBackend):
    """Reads what nothing may read."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, pools: Any, *given: Any, **scores: Any
    ) -> Tensor:
        attended = super().forward(query, key, value, pools, *given, **scores)
        return attended + 0 * pools[1].mean()


def test_a_touch_of_freed_slots_is_none() -> None:
    assert error_of(Poisoned, GEOMETRIES[0], torch.float32, CPU) == float("inf")


@pytest.mark.parametrize("geometry", [GEOMETRIES[1], GEOMETRIES[-1]], ids=str)
def test_the_kernels_agree(geometry: LayerGeometry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "_OWN", [(1, 1), (1, 140), (70, 70), (5, 40)])
    monkeypatch.setattr(agreement, "_HEAD_SLOTS", 32)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sharing = partial(TritonBackend, costs=ALWAYS)
    assert error_of(sharing, geometry, torch.float32, device) < TOLERANCE[torch.float32]


def test_torch_serves_where_kernels_fail(caplog: pytest.LogCaptureFixture) -> None:
    """Without a GPU, the device itself is what fails."""
    if torch.cuda.is_available():
        pytest.skip("the kernels work here")
    assert not TritonBackend.supports(GEOMETRIES[0], torch.float32, torch.device("cuda"))
    assert "runs in torch" in caplog.text


def test_a_server_on_a_cpu_imports_no_triton() -> None:
    """Kernels are imported inside of functions that run on GPUs only."""
    assert isinstance(choose_backend(GEOMETRIES[0], torch.float32, CPU), TorchBackend)
    root = Path(app.__file__).parent
    for path in root.rglob("*.py"):
        if "models/cuda" not in path.as_posix():
            imported = {name for node in ast.parse(path.read_text()).body for name in _imported(node)}
            kernels = {"triton", "app.models.cuda.attention", "app.models.cuda.kv_write"}
            assert not imported & kernels, path


def _imported(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return set()
