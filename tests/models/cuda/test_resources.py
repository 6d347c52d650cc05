"""What the compiled kernels take of a GPU, as Triton's own compiler and ptxas give it; no GPU is needed."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
SMALL_SPILL = 64  # bytes of a thread
MAX_SHARED = 227 * 1024
NEEDED_IN_FLIGHT = 40 * 1024  # to each multiprocessor of an H200 (app/models/cuda/blocks.py)
SCRIPT = """
import json, sys, torch
from app.models.cuda.resources import SHAPES, resources
names, dtypes = json.loads(sys.argv[1])
print(json.dumps([
    [name, dtype, each._asdict()]
    for name in names or SHAPES for dtype in dtypes for each in resources(SHAPES[name], getattr(torch, dtype))
]))
"""


def compiled(
    names: Sequence[str], dtypes: Sequence[str], cache: Path
) -> list[tuple[str, str, dict[str, Any]]]:
    """Compile in a process of its own: in this one the kernels may be interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, "-c", SCRIPT, json.dumps([names, dtypes])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [(name, dtype, each) for name, dtype, each in json.loads(done.stdout)]


def check(found: list[tuple[str, str, dict[str, Any]]]) -> None:
    for name, dtype, each in found:
        where = f"{name}, {dtype}: {each}"
        assert each["spilled"] <= SMALL_SPILL, where
        assert each["shared"] <= MAX_SHARED, where
        assert each["programs"] >= 1, where
        if dtype == "bfloat16" and each["kernel"] in {"rows", "tiles"}:
            assert each["matrix"] in {"wgmma", "mma.sync"}, where
        if dtype == "bfloat16" and each["kernel"] == "rows":
            assert each["in_flight"] >= NEEDED_IN_FLIGHT, where
            assert each["wide"] == 1.0 or "T5" in name, where


def test_kernels_fit_a_multiprocessor(tmp_path: Path) -> None:
    found = compiled(["Llama 8B"], ["bfloat16"], tmp_path)
    assert [each["kernel"] for _, _, each in found] == ["rows", "tiles", "merge", "write"]
    check(found)
    tiles = found[1][2]
    assert tiles["matrix"] == "wgmma"
    assert tiles["programs"] == 2, "one computes while the other waits"


@pytest.mark.soak
def test_kernels_of_all_layers_fit_a_multiprocessor(tmp_path: Path) -> None:
    check(compiled([], ["bfloat16", "float16", "float32"], tmp_path))


def test_layers_that_are_not_known_are_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from app.models.cuda.resources import main

    monkeypatch.setattr(sys, "argv", ["resources", "nonsense"])
    with pytest.raises(SystemExit):
        main()
    assert "unknown: nonsense; choose from " in capsys.readouterr().err


def test_numbers_of_a_model_or_a_call_choose_no_other_kernel() -> None:
    """What is compared at load is what serves: Triton would compile another one for multiples of 16."""
    code = (
        "from app.models.cuda.attention import attend; "
        "print(*(each.name for each in attend.params if each.do_not_specialize))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert found.stdout.split() == ["furthest", "window"], found.stderr
