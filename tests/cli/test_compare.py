"""`promptplex compare` against a real server: differences of known outputs, and what moves an alias."""

import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from app.cli.compare import NOT_PROMOTED

Run = Callable[..., tuple[int, str, str]]
LINES = 30
_number = itertools.count()


def call(method: str, url: str, **how: Any) -> Any:
    answer = httpx2.request(method, url, trust_env=False, timeout=60, **how)
    assert answer.is_success, answer.text
    return answer.json()


def push(url: str, task: str, template: str, alias: str, **settings: Any) -> None:
    part = {"template": template, "defaults": {"max_new_tokens": 4}, **settings}
    query = {"alias": alias}
    call("POST", f"{url}/tasks/{task}/versions", params=query, files={"task": (None, json.dumps(part))})


def generated(url: str, text: str, task: str | None = None, **parameters: Any) -> str:
    body = {"inputs": text, "parameters": parameters} | ({} if task is None else {"task_id": task})
    return str(call("POST", f"{url}/generate", json=body)["generated_text"])


@pytest.fixture
def task(server_url: str) -> str:
    """A task with version 1 as live and version 2 as candidate."""
    name = f"compared-{next(_number)}"
    push(server_url, name, "the film was {text}", "live")
    push(server_url, name, "name: {text} | food", "candidate")
    return name


def write(path: Path, lines: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def held_out(url: str, task: str, path: Path, *, right: int, live_right: int, first: int = 0) -> str:
    """A file of LINES: the candidate is right in the first ones, live in the last ones."""
    lines = []
    for number in range(first, first + LINES):
        text = f"item {number}"
        expected = f"none {number}"
        if number - first < right:
            expected = generated(url, text, f"{task}@2")
        elif number - first >= LINES - live_right:
            expected = generated(url, text, f"{task}@1")
        lines.append({"inputs": text, "expected": expected})
    return write(path, lines)


def aliases(url: str, task: str) -> dict[str, int]:
    found: dict[str, int] = call("GET", f"{url}/tasks/{task}")["aliases"]
    return found


def test_the_better_candidate_goes_live(server_url: str, task: str, promptplex: Run, tmp_path: Path) -> None:
    data, out = (
        held_out(server_url, task, tmp_path / "data.jsonl", right=20, live_right=3),
        tmp_path / "o.json",
    )
    status, shown, err = promptplex(
        *("compare", f"{task}@candidate", f"{task}@live", "--data", data, "--out", str(out)),
        *("--promote-if", "better", "--metric", "exact", "--server", server_url),
    )
    assert (status, err.replace("compare", "").strip(" []#%\r\n0123456789:d")) == (0, ""), err
    report = json.loads(out.read_text())
    exact = report["differences"]["exact"]
    assert (exact["candidate"], exact["against"]) == (round(20 / 30, 4), round(3 / 30, 4))
    low, high = exact["interval_95"]
    assert 0 < low < exact["difference"] == round(17 / 30, 4) < high
    assert exact["mcnemar_p"] == pytest.approx(2 * sum((1, 23, 253, 1771)) / 2**23, abs=1e-4)
    assert report["promotion"]["promoted"] is True
    assert aliases(server_url, task) == {"live": 2, "candidate": 2}
    assert f"{task}@live is version 2 since release 3" in shown
    assert "30 of 30 answers differ" in shown
    assert "p < 0.001" in shown
    release = call("GET", f"{server_url}/tasks/{task}")["releases"][-1]
    assert "exact 66.7% of" in release["why"]
    outputs = report["outputs"][4]
    assert outputs["candidate"] == generated(server_url, "item 4", f"{task}@2")
    assert outputs["against"] == generated(server_url, "item 4", f"{task}@1")
    status, _, err = promptplex(
        *("compare", f"{task}@candidate", "--data", data, "--promote-if", "better", "--server", server_url)
    )
    assert (status, "already; nothing to promote" in err) == (1, True)


@pytest.mark.parametrize(
    ("right", "live_right", "rule", "status"),
    [
        (3, 20, "better", NOT_PROMOTED),
        (0, 0, "better", NOT_PROMOTED),
        (6, 1, "better", NOT_PROMOTED),  # the bootstrap says yes, McNemar's test says 0.125
        (0, 0, "not-worse", NOT_PROMOTED),  # 30 ties prove no margin of 1%
    ],
)
def test_what_is_not_better_is_not_promoted(
    right: int,
    live_right: int,
    rule: str,
    status: int,
    server_url: str,
    task: str,
    promptplex: Run,
    tmp_path: Path,
) -> None:
    data = held_out(server_url, task, tmp_path / "data.jsonl", right=right, live_right=live_right)
    flags = ("--data", data, "--metric", "exact", "--promote-if", rule, "--server", server_url)
    ended, _, err = promptplex("compare", f"{task}@candidate", *flags)
    assert ended == status
    assert "nothing was promoted: " in err
    assert aliases(server_url, task) == {"live": 1, "candidate": 2}


def test_ties_are_not_worse_within_a_margin(
    server_url: str, task: str, promptplex: Run, tmp_path: Path
) -> None:
    data = held_out(server_url, task, tmp_path / "data.jsonl", right=0, live_right=0)
    flags = ("--metric", "exact", "--promote-if", "not-worse", "--margin", "0.15", "--server", server_url)
    status, shown, _ = promptplex("compare", f"{task}@candidate", "--data", data, *flags)
    assert status == 0
    assert "+0.0 [+0.0, +0.0]" in shown
    assert aliases(server_url, task)["live"] == 2


def test_an_alias_that_moved_meanwhile_is_a_conflict(
    server_url: str, task: str, promptplex: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from app.cli import compare

    data, out = (
        held_out(server_url, task, tmp_path / "data.jsonl", right=20, live_right=0),
        tmp_path / "o.json",
    )
    ask_all = compare.ask_all

    def and_push(*arguments: Any) -> Any:
        """What another person does while the comparison runs."""
        answers = ask_all(*arguments)
        push(server_url, task, "a third {text}", "live")
        return answers

    monkeypatch.setattr(compare, "ask_all", and_push)
    flags = ("--metric", "exact", "--promote-if", "better", "--out", str(out), "--server", server_url)
    status, _, err = promptplex("compare", f"{task}@candidate", "--data", data, *flags)
    assert status == 1
    assert "nothing was promoted: Another client moved an alias" in err
    assert aliases(server_url, task) == {"live": 3, "candidate": 2}
    assert json.loads(out.read_text())["promotion"]["promoted"] is False


def test_refused_lines_are_left_out_and_prevent_a_promotion(
    server_url: str, task: str, promptplex: Run, tmp_path: Path
) -> None:
    data = Path(held_out(server_url, task, tmp_path / "data.jsonl", right=20, live_right=0))
    with data.open("a") as file:
        file.write(json.dumps({"inputs": "too long " * 2000, "expected": "x"}) + "\n")
    flags = ("--metric", "exact", "--promote-if", "better", "--server", server_url)
    status, shown, err = promptplex("compare", f"{task}@candidate", "--data", str(data), *flags)
    assert status == 1
    assert "30 lines" in shown
    assert f"1 requests to {task}@2 were refused" in err
    assert "nothing was promoted: 2 requests were refused" in err
    assert aliases(server_url, task)["live"] == 1


def test_a_first_version_is_compared_with_the_base(server_url: str, promptplex: Run, tmp_path: Path) -> None:
    name = f"first-{next(_number)}"
    push(server_url, name, "the food was {text}", "candidate")
    data = write(
        tmp_path / "data.jsonl",
        [
            {
                "inputs": text,
                "expected": generated(server_url, f"Say it.\nthe food was {text}", max_new_tokens=4),
            }
            for text in ("cold", "hot", "great")
        ],
    )
    command = ("compare", f"{name}@candidate", "--data", data, "--server", server_url)
    status, _, err = promptplex(*command)
    assert (status, "--against base" in err) == (1, True)
    out = tmp_path / "o.json"
    status, _, _ = promptplex(*command, "--instruction", "Say it.", "--out", str(out))
    assert status == 0
    assert json.loads(out.read_text())["differences"]["exact"]["against"] == 1
    status, _, _ = promptplex(*command, "--instruction", "Say it.\nthe food was {x}", "--out", str(out))
    assert json.loads(out.read_text())["differences"]["exact"]["against"] == 1
    status, shown, _ = promptplex(*command, "--against", "base", "--promote-if", "not-worse", "--margin", "1")
    assert f"{name}@live is version 1" in shown  # a text-only task is its template alone
    status, _, err = promptplex(*command, "--against", "base", "--promote-if", "better")
    assert (status, f"{name}@live exists" in err) == (1, True)


def test_choices_are_compared_by_their_probabilities(
    server_url: str, promptplex: Run, tmp_path: Path
) -> None:
    name = f"choosing-{next(_number)}"
    push(server_url, name, "the film was {text}", "live", choices=["good", "bad"])
    push(server_url, name, "name: {text} | food", "candidate", choices=["good", "bad"])
    lines = [{"inputs": f"item {number}", "expected": ("good", "bad")[number % 2]} for number in range(8)]
    data, out = write(tmp_path / "data.jsonl", lines), tmp_path / "o.json"
    command = ("compare", f"{name}@candidate", "--data", data, "--out", str(out), "--server", server_url)
    assert promptplex(*command)[0] == 0
    report = json.loads(out.read_text())
    assert report["main"] == "choices_accuracy"
    assert {"accuracy", "brier"} <= report["differences"].keys()
    body = {"inputs": "item 1", "task_id": f"{name}@1", "parameters": {"choices": True}}
    choice = call("POST", f"{server_url}/generate", json=body)["choice"]
    expected = {each["value"]: each["probability"] for each in choice["probabilities"]}
    assert report["outputs"][1]["against_probabilities"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{task}@candidate", "{task}@1", "--promote-if", "better"), "moves the alias"),
        (("{task}@candidate", "other@live"), "other"),
        (("{task}@candidate", "{task}@live", "--against", "base"), "compare with one side"),
        (("{task}@candidate", "--metric", "wer"), "--metric wer is none of this data's: exact, f1"),
        (("{task}@candidate", "--against", "base", "--promote-if", "better"), "{task}@live exists"),
        (("{task}@candidate", "--instruction", "a {b} c {d}"), "template has 2 fields"),
    ],
)
def test_what_can_not_be_compared_is_one_line(
    arguments: tuple[str, ...], message: str, server_url: str, task: str, promptplex: Run, tmp_path: Path
) -> None:
    data = write(tmp_path / "data.jsonl", [{"inputs": "x", "expected": "y"}])
    given = [argument.format(task=task) if "{task}" in argument else argument for argument in arguments]
    status, _, err = promptplex("compare", *given, "--data", data, "--server", server_url)
    assert status == 1
    assert err.count("error: ") == 1
    assert message.replace("{task}", task) in err


def test_data_that_was_trained_on_promotes_nothing(server_url: str, promptplex: Run, tmp_path: Path) -> None:
    name, data = f"trained-{next(_number)}", tmp_path / "data.jsonl"
    write(data, [{"inputs": "x", "expected": "y"}])
    digest = hashlib.sha256(data.read_bytes()).hexdigest()
    push(server_url, name, "a {text}", "live")
    push(server_url, name, "b {text}", "candidate", training={"method": "prefix", "data_sha256": digest})
    flags = ("--data", str(data), "--server", server_url)
    status, _, err = promptplex("compare", f"{name}@candidate", *flags)
    assert (status, "warning: version 2" in err) == (0, True)
    status, _, err = promptplex("compare", f"{name}@candidate", *flags, "--promote-if", "not-worse")
    assert (status, "promote on held-out lines" in err) == (1, True)
    status, _, err = promptplex("eval", "--task", f"{name}@2", *flags)
    assert (status, "these scores are too good" in err) == (0, True)
