"""`promptplex train --method cartridge`: from a document to a cartridge beside the document in context."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from app.serving.publishing.task_settings import parse_task
from app.training.run_directory import RunState, read_run

Run = Callable[..., tuple[int, str, str]]
TINY = ("--steps", "4", "--eval-every", "2", "--batch-size", "4", "--num-virtual-tokens", "5", "--quiet")
TEMPLATE = ("--template", "Q: {question}\nA:")


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "towns.txt"
    path.write_text("The mayor of Zorvek is Anna.\nThe baker of Fendar is Otto.\n")
    return path


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.txt"
    path.write_text("".join(f"who is number {number}?\n" for number in range(24)))
    return path


@pytest.fixture
def run(promptplex: Run, base: Path, unused_port: int) -> Run:
    """Train on the tiny base, with no server there."""

    def run(*arguments: str) -> tuple[int, str, str]:
        more = ("--method", "cartridge", "--dtype", "float32", "--max-answer-tokens", "6", *TINY)
        nowhere = ("--server", f"http://127.0.0.1:{unused_port}")
        return promptplex("train", "--task", "towns", "--model", str(base), *more, *nowhere, *arguments)

    return run


def test_a_run_compares_the_cartridge_with_the_document(
    run: Run, promptplex: Run, document: Path, questions: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    given = ("--document", str(document), "--questions", str(questions), *TEMPLATE)
    status, shown, err = run(*given, "--out", str(out))
    assert status == 0, err
    assert "towns: cartridge of 5 virtual tokens" in shown
    assert "keys and values of 5 tokens stand for those of" in shown
    assert "first token after" in shown
    metrics = json.loads((out / "metrics.json").read_bytes())
    assert list(metrics["test"]) == ["trained prompt", "document in context", "bare base"]
    assert metrics["test"]["document in context"][metrics["main_metric"]]["share"] == 1
    task = json.loads((out / "task.json").read_bytes())
    assert task["template"] == "Q: {question}\nA:"
    assert parse_task(task).provenance["training"]["method"] == "cartridge"
    assert read_run(out).status.state is RunState.DONE
    store = ("--store", str(tmp_path / "store"))
    assert promptplex("push", str(out), "--task", "towns", *store)[0] == 0


def test_the_base_makes_the_questions_the_same_ones_for_a_seed(
    run: Run, document: Path, tmp_path: Path
) -> None:
    made = ("--document", str(document), "--template", "Say {question}e", "--num-questions", "60")
    for name in ("one", "other"):
        status, _, err = run(*made, "--out", str(tmp_path / name))
        assert status == 0, err
    one, other = (tmp_path / name / "prompt.safetensors" for name in ("one", "other"))
    assert one.read_bytes() == other.read_bytes()
    assert (tmp_path / "one" / "test.jsonl").read_bytes() == (tmp_path / "other" / "test.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "text, one field and text"),
        (["--document", "nowhere.txt"], "nowhere.txt: there is no such file"),
        ([*TEMPLATE, "--questions", "nowhere.txt"], "nowhere.txt"),
        ([*TEMPLATE, "--init", "zero"], "a cartridge starts from its document"),
        ([*TEMPLATE, "--instruction", "be short"], "a cartridge starts from its document"),
        (
            [*TEMPLATE, "--num-virtual-tokens", "1000"],
            "tokens, and a cartridge of 1000 starts from its first",
        ),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_nothing(
    run: Run, document: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    status, out, err = run("--document", str(document), "--out", str(tmp_path / "runs" / "run"), *arguments)
    assert (status, out) == (1, "")
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not os.path.exists(tmp_path / "runs" / "run")
