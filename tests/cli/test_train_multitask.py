"""`promptplex train --method multitask`: tasks that share a prompt, each of which gets one of its own."""

import json
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest

from app.serving.publishing.task_settings import parse_task
from app.store.prompt_file import read_prompt
from app.training.readers import read_examples
from app.training.run_directory import RunState, read_run

Run = Callable[..., tuple[int, str, str]]
TINY = ("--steps", "4", "--eval-every", "2", "--batch-size", "4", "--num-virtual-tokens", "3", "--quiet")
PUSHED = ("prompt.safetensors", "task.json", "test.jsonl", "metrics.json")


@pytest.fixture(scope="module")
def moods(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty lines of two labels."""
    lines = [
        {"text": f"the {what} was {how} on day {day}", "label": label}
        for day in range(10)
        for what in ("film", "food")
        for how, label in (("great", "up"), ("cold", "down"))
    ]
    return written(tmp_path_factory.mktemp("data") / "moods.jsonl", lines)


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty lines with two fields."""
    lines = [
        {"inputs": {"one": str(one), "other": str(other)}, "output": f"it is {one + other}"}
        for one in range(6)
        for other in range(5)
    ]
    return written(tmp_path_factory.mktemp("data") / "sums.jsonl", lines)


def written(path: Path, lines: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def run(promptplex: Run, base: Path, unused_port: int) -> Run:
    """Train on the tiny base, with no server there."""
    nowhere = ("--server", f"http://127.0.0.1:{unused_port}")

    def run(*arguments: str) -> tuple[int, str, str]:
        return promptplex("train", "--model", str(base), *TINY, *nowhere, *arguments)

    return run


def test_tasks_that_learn_together_become_ordinary_prompts(
    run: Run, promptplex: Run, server_url: str, base: Path, moods: Path, sums: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = (f"moods={moods}", f"sums={sums}", "--method", "multitask", "--out", str(out))
    pushed = ("--server", server_url, "--push")
    status, shown, err = promptplex("train", "--model", str(base), *TINY, *command, *pushed)
    assert status == 0, err
    assert "moods@1 is candidate\nmake it live: promptplex compare moods@candidate --against base " in shown
    assert "sums@1 is candidate\nmake it live: promptplex compare sums@candidate --against base " in shown

    view = read_run(out)
    assert (view.status.state, view.status.task) == (RunState.DONE, "moods, sums")
    mains = {"moods": "accuracy", "sums": "exact"}
    for look in view.history.looks:
        mean, *each = look.scores.values()
        assert [*look.scores] == ["mean score", *(f"{task} {main}" for task, main in mains.items())]
        assert mean == pytest.approx(sum(each) / 2)
    page = (out / "report.html").read_text()
    assert "moods: a prompt trained on tiny" in page
    assert "sums: a prompt trained on tiny" in page

    folders = {task: out / "tasks" / task for task in mains}
    for task, folder in folders.items():
        assert sorted(path.name for path in folder.iterdir()) == sorted(PUSHED)
        metrics = json.loads((folder / "metrics.json").read_bytes())
        assert mains[task] in metrics["test"]["trained prompt"]
        assert metrics["data"]["num_examples"]["test"] == len(read_examples(folder / "test.jsonl"))
        record = parse_task(json.loads((folder / "task.json").read_bytes())).provenance["training"]
        assert {"loss", "dev loss", "dev mean score", f"dev {mains[task]}"} == {*record["curves"]}
        assert record["settings"]["tasks"] == "moods, sums"
        assert httpx2.get(f"{server_url}/tasks/{task}", trust_env=False).json()["aliases"] == {"candidate": 1}
    parts = {task: json.loads((folder / "task.json").read_bytes()) for task, folder in folders.items()}
    assert parts["moods"]["choices"] == ["down", "up"]
    assert parts["moods"]["template"] == "{text}\n"
    assert "choices" not in parts["sums"]
    assert parts["sums"]["template"] == "one: {one}\nother: {other}\n"
    prompts = [(folder / "prompt.safetensors").read_bytes() for folder in folders.values()]
    assert prompts[0] != prompts[1]
    assert {read_prompt(prompt).num_virtual_tokens for prompt in prompts} == {3}

    before = {path: path.read_bytes() for folder in folders.values() for path in folder.glob("*.safetensors")}
    status, _, err = run(*command, "--resume")
    assert status == 0, err
    assert {path: path.read_bytes() for path in before} == before
    for changed in ((f"moods={moods}", f"other={sums}"), (f"sums={sums}", f"moods={moods}")):
        status, _, err = run(*changed, *command[2:], "--resume")
        assert status == 1
        assert "tasks was moods, sums and is now" in err

    start = ("--init-from", str(folders["sums"]), "--method", "prompt", "--steps", "1")
    status, shown, err = run(str(moods), "--task", "new", *start, "--out", str(tmp_path / "new"))
    assert status == 0, err
    assert "new: prompt of" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a={moods}", "a={sums}"], "a: two tasks have this name"),
        (["a={moods}", "{sums}"], "sums.jsonl: it has no name"),
        (["not an id={moods}", "b={sums}"], "A task id is"),
        (["a={moods}"], "there is one NAME=PATH only; for one task write --task a"),
        (["{moods}", "--task", "a"], "needs the data of two or more tasks"),
        (["a={moods}", "b={sums}", "--task", "c"], "leave out --task c"),
        (["a={moods}", "b={sums}", "--method", "prefix"], "--method prefix trains for one task"),
        (["a={moods}", "b={sums}", "--task-file", "t.json"], "--task-file has the settings of one task"),
        (["a={moods}", "b={sums}", "--template", "{{one}}"], "b: sums.jsonl, line "),
        (["a={moods}", "b={sums}", "--instruction", "{{text}}: up or down?"], "b: sums.jsonl, line "),
        (["a={moods}", "b=nowhere.jsonl"], "b: nowhere.jsonl"),
        (["{moods}"], "name the task with --task"),
    ],
)
def test_what_cannot_learn_together_is_one_line_and_leaves_nothing(
    run: Run, moods: Path, sums: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    given = [each.format(moods=moods, sums=sums) for each in arguments]
    status, out, err = run("--method", "multitask", "--out", str(tmp_path / "run"), *given)
    assert (status, out) == (1, "")
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not (tmp_path / "run").exists()
