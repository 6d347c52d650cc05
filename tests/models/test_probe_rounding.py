"""Weights rounded to 8 bits: what they change is measured at load, and refused where it is too much."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from app.errors import UnsupportedModel
from app.models import placement, probe_rounding
from app.models.cpu.products import why_no_int8
from app.models.loading import LoadedBase, load_base
from app.models.placement import check_int8
from tests.models.conftest import save
from tests.tiny_models import tiny_model, tiny_seq2seq

needs_int8 = pytest.mark.skipif(why_no_int8() is not None, reason="no products of integers here")


def load(directory: Path, **settings: Any) -> LoadedBase:
    given = {"progress": lambda _: None, "dtype": "bfloat16", "weights": "int8"} | settings
    return load_base(str(directory), device="cpu", **given)


@needs_int8
@pytest.mark.parametrize("make", [tiny_model, tiny_seq2seq])
def test_a_text_is_compared_before_and_after(tmp_path: Path, make: Callable[[str], PreTrainedModel]) -> None:
    lines: list[str] = []
    base = load(save(make("llama" if make is tiny_model else "t5"), tmp_path / "base"), progress=lines.append)
    rounding = base.report.rounding
    assert rounding is not None
    assert base.report.weights_error is None
    assert 0 < rounding.divergence < 0.1
    assert 0.8 < rounding.agreement <= 1
    assert rounding.positions == 256
    assert str(rounding) in lines
    assert str(rounding) in str(base.report)


@needs_int8
def test_too_large_a_change_is_refused(saved_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_rounding, "DIVERGENCE_BOUND", 0.0)
    with pytest.raises(UnsupportedModel, match="leave --weights away to serve it in bf16"):
        load(saved_llama)


@needs_int8
def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(UnsupportedModel, match="diverge by nan"):
        load(save(model, tmp_path / "nan"))


CPU, BF16 = torch.device("cpu"), torch.bfloat16


@pytest.mark.parametrize(
    ("config", "dtype", "device", "missing", "reason"),
    [
        ({}, BF16, torch.device("cuda"), None, "the device is cuda"),
        ({}, torch.float32, CPU, None, "not float32; take --dtype bfloat16"),
        ({"quantization_config": {"quant_method": "awq"}}, BF16, CPU, None, "quantized already"),
        ({}, BF16, CPU, "there is no compiler", "there is no compiler; leave --weights away"),
    ],
)
def test_what_it_needs_is_said(
    monkeypatch: pytest.MonkeyPatch,
    config: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    missing: str | None,
    reason: str,
) -> None:
    monkeypatch.setattr(placement, "why_no_int8", lambda: missing)
    with pytest.raises(UnsupportedModel, match=f"--weights int8 isn't possible: .*{reason}"):
        check_int8(PreTrainedConfig(**config), dtype, device)


def test_float32_is_refused_at_load(saved_llama: Path) -> None:
    with pytest.raises(UnsupportedModel, match="take --dtype bfloat16"):
        load(saved_llama, dtype="float32")
