"""The throughput script runs, and both sides say the same."""

import json
from pathlib import Path

import pytest

from benchmarks.throughput import main


def test_both_sides_do_the_same_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "throughput.json"
    main(["--tiny", "--rounds", "1", "--out", str(out)])
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads(out.read_text())
    assert result["work"]["tasks"] == 8
    assert result["agreement"]["first_token"] >= 0.75  # bf16 on random weights: ties may break apart
    assert set(result["tokens_per_second"]) == {"promptplex", "peft"}
