"""`promptplex train` on files that can't be trained on: one line, exit status 1, and nothing is left."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.training.bad_data import BAD, HUGE, write

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def refused(promptplex: Run, tmp_path: Path) -> Callable[..., str]:
    """Train on a file; return the one line that comes."""

    def refused(path: Path, model: Path | str = "nowhere", *more: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        out = ("--out", str(tmp_path / "runs" / "bad"))
        arguments = ("--task", "bad", "--model", str(model), "--quiet", *out, *more)
        status, shown, err = promptplex("train", str(path), *arguments)
        assert (status, shown) == (1, "")
        assert sorted(tmp_path.rglob("*")) == before
        lines = err.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        assert errors == lines[-1:]
        assert model != "nowhere" or lines == errors  # a base is loaded with lines of its own
        return errors[0]

    return refused


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_one_line_and_leaves_nothing(
    refused: Callable[..., str], tmp_path: Path, case: str
) -> None:
    path, expected = write(case, tmp_path)
    line = refused(path)
    assert line.startswith(f"error: {path.name}")
    assert expected in line


def test_a_line_of_100_mb_is_one_line_too(refused: Callable[..., str], tmp_path: Path) -> None:
    HUGE["x.jsonl"](tmp_path / "x.jsonl")
    assert "error: x.jsonl, line 1: it has more than 8388608 bytes" in refused(tmp_path / "x.jsonl")


def _rows(count: int, **last: Any) -> str:
    rows = [{"inputs": f"question {number}", "output": f"answer {number}"} for number in range(count)]
    rows[-1] |= last
    return "".join(json.dumps(row) + "\n" for row in rows)


LONG = "word " * 3000
TOO_MUCH = {
    "answer": ({"output": LONG}, "x.jsonl, line 40: 0 learned + "),
    "input": ({"inputs": LONG}, "x.jsonl, line 40: 0 learned + "),
    "input by far": (
        {"inputs": LONG * 100},
        "x.jsonl, line 40: the input alone has more tokens than the base's 2048",
    ),
    "fields": ({"inputs": {"name": "x"}}, "x.jsonl, line 40: inputs must have exactly the fields text"),
}


@pytest.mark.parametrize("case", TOO_MUCH)
def test_what_the_base_does_not_take_is_one_line(
    refused: Callable[..., str], base: Path, tmp_path: Path, case: str
) -> None:
    last, expected = TOO_MUCH[case]
    (tmp_path / "x.jsonl").write_text(_rows(40, **last))
    assert expected in refused(tmp_path / "x.jsonl", base)


def test_labels_longer_than_the_context_are_one_line(
    refused: Callable[..., str], base: Path, tmp_path: Path
) -> None:
    labels = ["é" * 1000, "ü" * 1000]  # 2,000 tokens each
    rows = [{"text": f"text {number}", "label": labels[number % 2]} for number in range(40)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = refused(tmp_path / "x.jsonl", base, "--num-virtual-tokens", "200")
    assert "but the base has 2048 positions. 4" in line or " examples are too long" in line


def test_a_test_file_that_is_train_is_one_line(refused: Callable[..., str], tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train", "test"):
        (data / f"{name}.jsonl").write_text(_rows(40))
    line = refused(data)
    assert "error: train.jsonl: it holds 0 different inputs to train on" in line
    assert "since their inputs are held out too: 40, such as train.jsonl, line 1 (test.jsonl, line 1)" in line
