"""The table of trained prompts: a stopped one goes on, and its report has every seed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from app.training.settings import Init, Method
from benchmarks import training_table, training_table_report
from benchmarks.training_table import TASKS, Run, fill, finished, runs
from benchmarks.training_table_report import cells_of, length_table, rate_table


def test_no_run_is_done_twice() -> None:
    assert len(set(runs())) == len(runs())
    shares = [runs()[number::2] for number in range(2)]
    assert sorted(map(str, runs())) == sorted(map(str, [*shares[0], *shares[1]]))


@pytest.mark.slow
def test_a_stopped_table_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "known", replace(TASKS["known"], steps=1))
    for name, number in {"NUM_TRAIN": 8, "NUM_DEV": 4, "NUM_TEST": 4}.items():
        monkeypatch.setattr(training_table, name, number)
    wanted = [Run("known", Method.PROMPT, "none", Init.LABELS, 5, 0.03, seed) for seed in range(2)]
    monkeypatch.setattr(training_table, "runs", lambda: wanted[:1])
    target = tmp_path / "table.jsonl"
    fill(target, (1, 1))
    (first,) = target.read_text().splitlines()
    monkeypatch.setattr(training_table, "runs", lambda: wanted)
    fill(target, (1, 1))
    lines = target.read_text().splitlines()
    assert lines[0] == first
    assert len(lines) == 2
    assert finished(target) == set(wanted)
    assert len(json.loads(first)["dev_losses"]) == 2


def test_a_cell_has_the_seeds_of_its_setting(tmp_path: Path) -> None:
    run = {"task": "new", "network": "none", "init": "text"}
    lines = [
        {
            "run": {**run, "method": method, "learning_rate": rate, "length": length, "seed": seed},
            "accuracy": accuracy,
        }
        for method, rate, length, seed, accuracy in (
            ("prompt", 0.03, 5, 0, 0.5),
            ("prefix", 0.02, 1, 0, 0.1),
            ("prefix", 0.02, 1, 1, 0.3),
            ("prefix", 0.02, 16, 0, 0.9),
            ("prefix", 0.05, 16, 0, 0.7),
        )
    ]
    assert [cell.accuracies for cell in cells_of(lines)] == [(0.5,), (0.1, 0.3), (0.9,), (0.7,)]
    assert length_table(cells_of(lines), "new")[2:] == [
        "| prefix, text | 20% (10 to 30) |  | 90% |",
        "| prompt, text |  | 50% |  |",
    ]
    assert rate_table(cells_of(lines), "new", 16)[2:] == [
        "| prefix, text | 0.02 (default) | 90% |",
        "| prefix, text | 0.05 | 70% |",
    ]
    target = tmp_path / "plot.svg"
    training_table_report.plot(cells_of(lines), "new", target)
    assert "<svg" in target.read_text()
