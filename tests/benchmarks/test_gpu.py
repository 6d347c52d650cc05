"""benchmarks.gpu at tiny size: every part that a CPU can run runs, on a bare machine; failures stay apart."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.__main__ import is_right, main
from benchmarks.gpu.apart import run_apart
from benchmarks.gpu.goals import GOALS, goals_json
from benchmarks.gpu.plots import plot
from benchmarks.gpu.sanitizer import verdict
from benchmarks.gpu.setup import Setup
from benchmarks.gpu.table import table, wrong_figures
from benchmarks.gpu.throughput import MAIN, ONE
from tests.benchmarks import gpu_parts

ROOT = Path(__file__).parents[2]
THROUGHPUT = "throughput tiny"


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process printed that ran all parts, with little more than torch and transformers to import."""
    folder = tmp_path_factory.mktemp("bare")
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("bare_machine.py")), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def test_all_parts_run_on_a_bare_machine(bare: dict[str, Any]) -> None:
    assert not bare["loaded"]
    parts = bare["report"]["parts"]
    assert list(parts) == ["exactness llama", "kernels tiny", THROUGHPUT, "sanitizer"]
    assert {name: part["error"] for name, part in parts.items()} == dict.fromkeys(parts)


def test_tasks_in_one_batch_equal_each_alone_with_and_without_kernels(bare: dict[str, Any]) -> None:
    llama = bare["report"]["parts"]["exactness llama"]["found"]
    assert llama["answers"] > 1
    assert {name: each["wrong"] for name, each in llama["with"].items()} == {"all": 0, "without kernels": 0}


def test_kernels_are_compared_with_torch(bare: dict[str, Any]) -> None:
    found = bare["report"]["parts"]["kernels tiny"]["found"]
    assert len(found["errors"]) > 1
    assert all(each["float32"]["is right"] for each in found["errors"].values())
    assert all(found["writes"].values())
    assert not wrong_figures(bare["report"])


def test_throughput_has_all_its_measurements(bare: dict[str, Any], tmp_path: Path) -> None:
    measured = bare["report"]["parts"][THROUGHPUT]["found"]["measured"]
    assert not [name for name, each in measured.items() if "error" in each or "left out" in each]
    cells = [each for name, each in measured.items() if name.startswith("B ")]
    assert all(each["limit_seconds"] > 0 and each["tokens_per_second"]["median"] > 0 for each in cells)
    assert measured["first token"]["ratio"]["median"] > 0
    assert set(measured["switches"]) == {"kernels"}
    assert measured["switches"]["kernels"]["same answers"] == 1
    (written,) = plot(bare["report"], tmp_path)
    assert written.read_text().startswith("<?xml")
    assert f"{THROUGHPUT}:" in bare["table"]


def test_a_part_that_fails_or_dies_leaves_what_it_found(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    failed = run_apart(gpu_parts.fails, Setup(device="cpu"), 600, log)
    assert failed["error"] == "ValueError: no such kernel"
    assert failed["found"] == {"device": "cpu"}
    assert "Traceback" in log.read_text()
    dead = run_apart(gpu_parts.dies, Setup(device="cpu"), 600, log)
    assert dead["error"] == "ended with status -9"
    assert dead["found"] == {"begun": True}


def test_a_part_beyond_its_limit_is_stopped(tmp_path: Path) -> None:
    hung = run_apart(gpu_parts.hangs, Setup(device="cpu"), 0.1, tmp_path / "log.txt", grace=0)
    assert hung["error"] == "stopped after 0 s"


def test_without_a_gpu_it_says_what_can_be_done(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main([]) == 2
    assert "--compile-only" in capsys.readouterr().err


@pytest.mark.parametrize("minutes", ["nan", "0", "-1", "inf", "two"])
def test_a_time_that_is_none_is_refused(minutes: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--minutes", minutes])
    assert "argument --minutes: " in capsys.readouterr().err


def _reported(value: float) -> dict[str, Any]:
    """A report in which every goal's figure is `value`."""
    spread = {"median": value, "quartiles": [value, value]}
    cell = {"of_limit": value, "tokens_per_second": spread, "decode_step_seconds": spread}
    peers = {"PEFT, grouped by task": {"ratio": spread}}
    measured = {MAIN.name: cell, ONE.name: cell, "peers": peers, "tasks": {"ratio": spread}}
    found = {"measured": measured | {"first token": {"ratio": spread}}}
    return {"parts": {goal.part: {"found": found, "seconds": 1.0, "error": None} for goal in GOALS}}


def test_goals_are_met_on_the_right_side_of_their_bounds() -> None:
    high, low = (
        {goal["goal"]: goal["is met"] for goal in goals_json(_reported(value))} for value in (31, 0.1)
    )
    assert all(high[name] is not low[name] for name in high)
    assert [name for name, is_met in high.items() if not is_met] == [
        "8B: first token, p 2000 beside none",
        "0.5B: first token, p 2000 beside none",
    ]
    assert {goal["is met"] for goal in goals_json({"parts": {}})} == {None}


def test_the_table_ends_with_goals_and_parts() -> None:
    report = _reported(0.85)
    report["goals"] = goals_json(report)
    report["parts"]["kernels"] = {"found": {}, "seconds": 3.0, "error": "RuntimeError: no kernel"}
    lines = table(report).splitlines()
    assert "  met: 8B, 64 rows: of t* in a decode step: 0.85 (bound 0.8)" in lines
    assert "  NOT MET: 8B, 64 rows: times PEFT, grouped by task: 0.85 (bound 30)" in lines
    assert lines[-1] == "  kernels: 3 s, RuntimeError: no kernel"
    assert not is_right(report)


def test_what_differs_is_named() -> None:
    found = {
        "exactness llama": {"with": {"all": {"wrong": 0}, "without graphs": {"wrong": 2}}},
        "exactness gpt2": {"with": {"all": {"error": "RuntimeError"}}},
        "exactness t5": {"left out": "refused"},
        "exactness bart": {"with": {"all": {"wrong": 0}}},
        "kernels": {
            "errors": {
                "rows": {"float32": {"is right": True}, "bfloat16": {"is right": False}},
                "chunks": {"float32": {"is right": True}},
                "cross": {"error": "RuntimeError"},
            },
            "writes": {"64": True, "80": False},
        },
        "sanitizer": {"memcheck": {"errors": 0}, "racecheck": {"errors": 3}},
    }
    wrong = wrong_figures({"parts": {name: {"found": each} for name, each in found.items()}})
    expected = ["exactness llama", "exactness gpt2", "rows", "cross", "kernels, writes", "racecheck"]
    assert wrong == expected


@pytest.mark.parametrize(
    ("output", "status", "expected"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, {"errors": 0}),
        ("========= ERROR SUMMARY: 12 errors", 86, {"errors": 12}),
        ("========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)", 86, {"errors": 2}),
        ("========= Error: Device not supported", 1, {"left out": "compute-sanitizer doesn't support this"}),
        ("Segmentation fault", 139, {"error": "it ended with status 139 and no summary: Segmentation fault"}),
        ("========= ERROR SUMMARY: 0 errors", 1, {"error": "the program ended with status 1"}),
    ],
)
def test_the_sanitizers_output_is_read(output: str, status: int, expected: dict[str, Any]) -> None:
    ((name, value),) = verdict(output, status).items()
    ((expected_name, begins),) = expected.items()
    assert name == expected_name
    assert value == begins or value.startswith(begins)


@pytest.mark.soak
def test_the_command_tries_all_parts_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cpu", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    compared = ["exactness llama", "exactness bart", "kernels tiny"]
    assert list(report["parts"]) == ["facts", *compared, "times", THROUGHPUT, "sanitizer"]
    assert (tmp_path / "tiny.svg").is_file()
    assert "goals:" in capsys.readouterr().out


@pytest.mark.soak
def test_what_kernels_are_compiled_to_is_shown_without_a_gpu(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--compile-only"]) == 0
    assert "wgmma" in capfd.readouterr().out
