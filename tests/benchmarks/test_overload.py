"""The measurement of overload runs, and every answer is a result or a refusal."""

import json
from pathlib import Path

import pytest

from benchmarks.overload import BURST, TIMES, UNLOADED, main
from tests.bases import save_tiny_llama


def test_both_sides_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_tiny_llama(tmp_path / "tiny")
    out = tmp_path / "report.json"
    size = ["--rows", "4", "--queue", "8", "--new-tokens", "8", "--rounds", "2"]
    main(["--model", str(base), *size, "--out", str(out)])
    sides = json.loads(out.read_text())["sides"]
    assert set(sides) == set(TIMES)
    assert sides[UNLOADED]["served"] == [12, 12]
    assert sides[BURST]["refused"][0] > 0
    assert all(side["tokens_per_second"]["median"] > 0 for side in sides.values())
    assert "Of the unloaded throughput" in capsys.readouterr().out
