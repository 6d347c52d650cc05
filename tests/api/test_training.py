"""Training runs over HTTP, with a process in miniature: started, watched, cancelled, refused."""

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.api.state import ApiConfig, ServerState
from app.keys.key import Scope
from tests.api.server import client_of, raw_exchange, services_of, serving
from tests.api.test_generate import error_of, publish_text
from tests.api.test_keys import Keys
from tests.serving.stack import BASE_NAME, Stack
from tests.serving.training_runs.runs import Runs, running_runs
from tests.waiting import wait_until

LINES = b'{"text": "good", "label": "positive"}\n' * 3
UNPUBLISHED = {"publish": False}
LIMIT = 1 << 19


@pytest.fixture(scope="module")
def runs(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with running_runs(stack, tmp_path_factory.mktemp("training") / "runs") as service:
        yield service


@pytest.fixture(scope="module")
def url(stack: Stack, runs: Runs) -> Iterator[str]:
    config = ApiConfig(max_body_bytes=1 << 12, max_upload_bytes=LIMIT)
    with serving(ServerState(services=services_of(stack, runs)), config) as address:
        yield address


def start(
    client: httpx.Client, task_id: str, settings: Any = UNPUBLISHED, headers: Any = None, **files: bytes
) -> httpx.Response:
    parts: dict[str, Any] = {name: (f"../../{name}.csv", data) for name, data in files.items()}
    if not files:
        parts["data"] = ("/etc/passwd", LINES)
    parts["settings"] = (None, json.dumps(settings))
    return client.post(f"/tasks/{task_id}/training-runs", files=parts, headers=headers)


def ended(client: httpx.Client, run: dict[str, Any], headers: Any = None) -> dict[str, Any]:
    path = f"/tasks/{run['task_id']}/training-runs/{run['id']}"

    def found() -> dict[str, Any] | None:
        answer: dict[str, Any] = client.get(path, headers=headers).json()
        return None if answer["state"] in ("queued", "running") else answer

    answer = wait_until(found)
    assert answer is not None
    return answer


def test_a_run_is_watched_until_it_is_done(client: httpx.Client, runs: Runs, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    runs.plans["watched"] = {"reports": True, "gate": str(gate)}
    response = start(client, "watched", {"method": "prompt", "steps": 4, "publish": False})
    assert response.status_code == 202, response.text
    run = response.json()
    assert run["state"] in ("queued", "running")
    assert run["settings"] == {"method": "prompt", "steps": 4, "publish": False}
    assert run["files"] == {"data": len(LINES)}
    path = f"/tasks/watched/training-runs/{run['id']}"
    wait_until(lambda: client.get(path).json()["curves"].get("dev exact"))
    now = client.get(path).json()
    assert (now["state"], now["step"], now["steps"], now["ended_at"]) == ("running", 4, 4, None)
    gate.touch()
    done = ended(client, run)
    assert (done["state"], done["phase"], done["error"], done["published"]) == ("done", None, None, None)
    assert done["best_scores"] == {"exact": 0.75}
    listed = client.get("/tasks/watched/training-runs").json()["runs"]
    assert [each["id"] for each in listed] == [run["id"]]
    assert "curves" not in listed[0]
    assert client.get("/tasks/other/training-runs").json() == {"runs": []}


def test_a_file_has_a_name_of_ours(client: httpx.Client, runs: Runs, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    runs.plans["named"] = {"gate": str(gate)}
    files = {"train": LINES, "dev": b"text,label\nfine,good\n", "test": b"text\tlabel\nfine\tgood\n"}
    run = start(client, "named", **files).json()
    data = runs.directory.output(run["id"]).parent / "data"
    assert sorted(path.name for path in data.iterdir()) == ["dev.csv", "test.tsv", "train.jsonl"]
    assert (data / "train.jsonl").read_bytes() == LINES
    gate.touch()
    assert ended(client, run)["state"] == "done"


def test_cancel(client: httpx.Client, runs: Runs, tmp_path: Path) -> None:
    runs.plans["endless"] = {"gate": str(tmp_path / "never")}
    run, queued = (start(client, "endless").json() for _ in range(2))
    path = "/tasks/endless/training-runs"
    assert client.delete(f"{path}/{queued['id']}").json()["state"] == "cancelled"
    answer = client.delete(f"{path}/{run['id']}")
    assert answer.status_code == 200
    assert answer.json()["is_cancelling"] or answer.json()["state"] == "cancelled"
    assert ended(client, run)["state"] == "cancelled"
    assert client.delete(f"{path}/{run['id']}").json()["state"] == "cancelled"


def test_what_is_live_is_the_default_of_what_is_trained(
    client: httpx.Client, stack: Stack, runs: Runs, tmp_path: Path
) -> None:
    publish_text(client, "inherits", "Review: {text}\n", defaults={"max_new_tokens": 7})
    gate = tmp_path / "gate"
    runs.plans["inherits"] = {"gate": str(gate)}
    plain, changed = (
        start(client, "inherits", UNPUBLISHED | more).json() for more in ({}, {"task": {"template": "{a}"}})
    )
    parts = [runs.directory.record("inherits", run["id"]).task for run in (plain, changed)]
    assert parts[0] == {"template": "Review: {text}\n", "defaults": {"max_new_tokens": 7}}
    assert parts[1] == {"template": "{a}", "defaults": {"max_new_tokens": 7}}
    gate.touch()
    ended(client, plain), ended(client, changed)
    client.delete("/tasks/inherits")
    assert "retired; restore it" in error_of(start(client, "inherits"), 409)["message"]


def check(client: httpx.Client, data: bytes, settings: Any = UNPUBLISHED) -> httpx.Response:
    parts = {"data": ("", data), "settings": (None, json.dumps(settings))}
    return client.post("/tasks/checked/training-runs/check", files=parts)


def test_data_is_shown_before_anything_is_trained(client: httpx.Client, runs: Runs) -> None:
    rows = "".join(f"film {number},{('good', 'bad')[number % 2]}\n" for number in range(40))
    response = check(client, f"text,label\n{rows}film 0,good\n".encode())
    assert response.status_code == 200, response.text
    summary = response.json()
    assert summary["form"] == "text and label"
    assert sum(summary["num_examples"].values()) in (40, 41)
    assert summary["choices"] == ["bad", "good"]
    assert summary["fields"] == ["text"]
    first = summary["examples"][0]
    assert re.fullmatch(r"film \d+", first["inputs"])
    assert re.fullmatch(r"data.csv, line \d+", first["place"])
    wrong = error_of(check(client, b'{"text": "a", "lable": "b"}\n'), 422)
    assert wrong["param"] == "data"
    assert wrong["message"].startswith("data.jsonl, line 1: ")
    assert "label" in wrong["message"]
    assert error_of(check(client, LINES, {"dev_share": 2}), 422)["param"] == "settings.dev_share"
    root = runs.directory.output("x").parent.parent
    assert not list(root.glob(".new-*")), "nothing is kept"
    assert runs.directory.records("checked") == []


REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "unknown setting": ({"settings": {"learnig_rate": 1}}, 422, "settings has no field learnig_rate"),
    "of another type": ({"settings": {"steps": "5"}}, 422, "settings.steps"),
    "out of range": ({"settings": {"steps": 0}}, 422, "settings.steps"),
    "too many steps": ({"settings": {"steps": 900_000}}, 422, "settings.steps"),
    "NUL": ({"settings": {"instruction": "a\0b"}}, 422, "settings.instruction must not have"),
    "too long for a command": ({"settings": {"init_text": "\U0001f600" * 30_000}}, 422, "settings.init_text"),
    "other methods": ({"settings": {"method": "cartridge"}}, 422, "prompt, p-tuning, prefix"),
    "no such version": ({"settings": {"init_from": "nothing@3"}}, 404, "nothing"),
    "a path": ({"settings": {"init_from": "../prompts"}}, 422, "A task id is"),
    "task part": ({"settings": {"task": {"templat": ""}}}, 422, "task has no field templat"),
    "template": ({"settings": {"task": {"template": "{a b}"}}}, 422, "The template can't be used"),
    "no object": ({"settings": [1]}, 422, "must be a JSON object"),
    "two kinds of data": ({"data": LINES, "train": LINES}, 422, "Send the examples as the part data"),
    "no training data": ({"dev": LINES}, 422, "Send the examples as the part data"),
    "unknown part": ({"data": LINES, "eval": LINES}, 422, "There is no part eval"),
    "too large": ({"data": bytes(LIMIT)}, 413, "`promptplex train` reads larger files"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_begins_nothing(client: httpx.Client, runs: Runs, name: str) -> None:
    given, status, words = REFUSED[name]
    message = error_of(start(client, "refused", **given), status)["message"]
    assert words in message
    assert runs.directory.records("refused") == []


def test_a_body_that_stops_begins_nothing(url: str, runs: Runs) -> None:
    head = (
        "POST /tasks/cut/training-runs HTTP/1.1\nHost: localhost\nConnection: close\n"
        "Content-Type: multipart/form-data; boundary=x\nContent-Length: 64\n\n"
    )
    body = b'--x\r\nContent-Disposition: form-data; name="data"\r\n\r\n{"text": "'
    assert b" 400 " in raw_exchange(url, head, body.ljust(64))
    assert runs.directory.records("cut") == []


def test_names_that_no_task_may_have(client: httpx.Client) -> None:
    assert error_of(start(client, BASE_NAME), 422)["param"] == "task_id"
    assert error_of(start(client, "No Task"), 422)["param"] == "task_id"


def test_a_run_that_is_not_there(client: httpx.Client) -> None:
    for run_id in ("20260101-000000-00000000", "..", "%2e%2e%2frun"):
        assert client.get(f"/tasks/some/training-runs/{run_id}").status_code in (404, 422)
    assert (
        "GET /tasks/some/training-runs lists"
        in error_of(client.delete("/tasks/some/training-runs/20260101-000000-00000000"), 404)["message"]
    )


def test_it_is_off_unless_the_operator_turns_it_on(stack: Stack) -> None:
    with serving(ServerState(services=services_of(stack))) as url, client_of(url) as client:
        assert "--training true" in error_of(start(client, "off"), 404)["message"]
        assert client.get("/tasks/off/training-runs").status_code == 404


def test_keys(stack: Stack, runs: Runs, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = Keys(tmp_path / "keys.json")
    ada = keys.add("ada", Scope.TRAIN, tasks=("team-*",))
    other = keys.add("other", *set(Scope) - {Scope.TRAIN, Scope.METRICS})
    runs.plans["team-a"] = {"gate": str(tmp_path / "never")}
    state = ServerState(services=services_of(stack, runs))
    with serving(state, keys=keys.ring) as url, client_of(url) as client, caplog.at_level(logging.INFO):
        assert "scope train" in error_of(start(client, "team-a", headers=other), 403)["message"]
        assert "doesn't reach" in error_of(start(client, "alien", headers=ada), 403)["message"]
        examples = {"task": {"examples": [{"inputs": "a", "expected": "b"}]}}
        assert "scope generate" in error_of(start(client, "team-a", examples, ada), 403)["message"]
        chain = {"template": "{x} {so_far}", "steps": [{"task": "team-b"}, {"task": "alien"}]}
        steps = {"task": {"template": "{x}", "chain": chain}}
        assert "'alien'" in error_of(start(client, "team-a", steps, ada), 403)["message"]
        run, second = (start(client, "team-a", headers=ada).json() for _ in range(2))
        full = start(client, "team-a", headers=ada)
        assert "This key has 2 training runs" in error_of(full, 429)["message"]
        assert int(full.headers["retry-after"]) >= 1
        for each in (second, run):
            client.delete(f"/tasks/team-a/training-runs/{each['id']}", headers=ada)
        assert ended(client, run, ada)["who"] == "ada"
    said = [record.message for record in caplog.records if record.name == "promptplex.audit"]
    assert f"ada started training run {run['id']}: task team-a" in said
    assert f"ada cancelled training run {run['id']}: task team-a" in said
