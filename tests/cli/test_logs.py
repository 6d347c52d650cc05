"""What a running server logs: lines of JSON alone where asked, one for each request, nothing of prompts."""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2

from tests.cli.conftest import Server

Serve = Callable[..., Server]
SECRET = "xyzzy-secret"


def _flags(base: Path, store: Path) -> tuple[str, ...]:
    return ("--model", str(base), "--store", str(store), "--dtype", "float32")


def _use(url: str) -> None:
    """Requests of all kinds."""
    with httpx2.Client(base_url=url, trust_env=False, timeout=60) as client:
        body: dict[str, Any] = {"inputs": SECRET, "parameters": {"max_new_tokens": 3}}
        headers = {"x-request-id": "mine"}
        files = {"task": json.dumps({"template": "Say: {text}"})}
        assert client.post("/tasks/echo/versions", files=files).status_code == 201
        assert client.post("/generate", json=body | {"task_id": "echo"}, headers=headers).status_code == 200
        assert client.post("/generate_stream", json=body).status_code == 200
        completion = {"model": "tiny", "prompt": SECRET, "max_tokens": 2, "n": 2}
        assert client.post("/v1/completions", json=completion).status_code == 200
        client.get(f"/nothing%0aINFO%20forged?key={SECRET}")
        client.get("/health")
        client.post("/generate", content=SECRET)
    where = urlsplit(url)
    with socket.create_connection((where.hostname, where.port)) as connection:
        connection.sendall(b"no http\r\n\r\n")
        connection.recv(1000)


def test_json_lines_and_nothing_else(serve: Serve, base: Path, tmp_path: Path) -> None:
    server = serve(*_flags(base, tmp_path), "--log-format", "json", "--log-level", "debug")
    url = json.loads(server.wait_for("running on http://"))["event"].split()[3]
    server.wait_for("ready: ")
    _use(url)
    assert server.end() == 0
    records = [json.loads(line) for line in server.log.splitlines() if line != "<end>"]
    assert all({"event", "level", "logger", "timestamp"} <= record.keys() for record in records)
    assert {"promptplex", "promptplex.access", "uvicorn.error"} <= {record["logger"] for record in records}
    assert SECRET not in server.log

    requests = [record for record in records if record["event"] == "request"]
    assert all(record["ms"] >= 0 and record["request_id"] for record in requests)
    seen = [(each["level"], each["method"], each["path"], each["status"]) for each in requests]
    assert sorted(seen) == [
        ("debug", "GET", "/health", 200),
        ("info", "GET", "/nothing%0aINFO%20forged", 404),
        ("info", "POST", "/generate", 200),
        ("info", "POST", "/generate", 422),
        ("info", "POST", "/generate_stream", 200),
        ("info", "POST", "/tasks/echo/versions", 201),
        ("info", "POST", "/v1/completions", 200),
    ]
    by_path = {each["path"]: each for each in requests if each["status"] != 422}
    generated = by_path["/generate"]
    assert (generated["request_id"], generated["task"], generated["version"]) == ("mine", "echo", 1)
    assert generated["prompt_tokens"] > 0
    assert generated["generated_tokens"] <= 3
    assert "task" not in by_path["/generate_stream"]  # the base model
    assert 0 < by_path["/generate_stream"]["generated_tokens"] <= 3
    assert 0 < by_path["/v1/completions"]["generated_tokens"] <= 4
    assert not {"task", "generated_tokens", "key", "client_left"} & by_path["/nothing%0aINFO%20forged"].keys()
    assert [record["status"] for record in records if record["event"] == "refused"] == [400]


def test_a_dead_engine_ends_the_process_and_its_traceback_is_part_of_a_line(
    serve: Serve, base: Path, tmp_path: Path
) -> None:
    fault = "from app.engine.runner import Runner\nRunner.run = lambda *_: 1 / 0"
    server = serve(*_flags(base, tmp_path), "--log-format", "json", fault=fault)
    url = json.loads(server.wait_for("running on http://"))["event"].split()[3]
    server.wait_for("ready: ")
    answer = httpx2.post(f"{url}/generate", json={"inputs": "a"}, trust_env=False, timeout=60)
    assert answer.status_code == 503, answer.text
    assert "ZeroDivisionError" not in answer.text
    assert server.wait() == 1
    records = [json.loads(line) for line in server.log.splitlines() if line != "<end>"]
    died = next(record for record in records if record["event"] == "the engine died")
    assert died["level"] == "critical"
    assert "ZeroDivisionError" in died["exception"]


def test_text_for_people_can_not_be_forged(serve: Serve, base: Path, tmp_path: Path) -> None:
    server = serve(*_flags(base, tmp_path))
    url = server.wait_until_ready()
    _use(url)
    assert server.end() == 0
    assert SECRET not in server.log
    lines = server.log.splitlines()
    assert not [line for line in lines if line.startswith(("INFO forged", "INFO%20forged"))]
    line = next(line for line in lines if "request_id=mine" in line)
    assert line.startswith("INFO request method=POST path=/generate status=200 ms=")
    assert "task=echo" in line
    assert not [line for line in lines if "path=/health" in line]


def test_a_client_that_leaves_is_told(serve: Serve, base: Path, tmp_path: Path) -> None:
    server = serve(*_flags(base, tmp_path), "--log-format", "json")
    url = json.loads(server.wait_for("running on http://"))["event"].split()[3]
    server.wait_for("ready: ")
    body = {"inputs": "the film", "parameters": {"max_new_tokens": 1900}}
    with (
        httpx2.Client(base_url=url, trust_env=False, timeout=60) as client,
        client.stream("POST", "/generate_stream", json=body) as response,
    ):
        next(response.iter_bytes())
    line = json.loads(server.wait_for('"client_left": true'))
    assert (line["path"], line["status"]) == ("/generate_stream", 200)
    assert line["generated_tokens"] < 1900
