"""`GET /ops/stream`: what runs is told, to many readers at the price of one, until the server drains."""

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from app.api.routes.live import MAX_READERS, Lanes
from app.api.state import ServerState
from app.engine.client import LiveRow
from tests.api.server import client_of, services_of, serving
from tests.api.test_generate import error_of, publish_text
from tests.serving.stack import BASE_NAME, Stack, running_stack
from tests.waiting import PATIENCE, wait_until


@contextmanager
def snapshots(client: httpx.Client) -> Iterator[Iterator[dict[str, Any]]]:
    with client.stream("GET", "/ops/stream") as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = (line for line in response.iter_lines() if line)
        yield (json.loads(line.removeprefix("data: ")) for line in lines)


def until(stream: Iterator[dict[str, Any]], wanted: Any) -> dict[str, Any]:
    give_up = time.monotonic() + PATIENCE
    for snapshot in stream:
        if wanted(snapshot):
            return snapshot
        assert time.monotonic() < give_up, f"not within {PATIENCE} s; the last one: {snapshot}"
    raise AssertionError("the stream ended")


def test_at_rest(client: httpx.Client) -> None:
    with snapshots(client) as stream:
        first = until(stream, lambda each: each["running"] == 0)
        second = next(stream)
    assert first["phase"] == "ready"
    assert first["model"] == BASE_NAME
    assert (first["waiting"], first["max_rows"], first["redis"]) == (0, 16, "off")
    assert (second["rows"], second["batch_size"], second["distinct_tasks"]) == ([], 0, 0)
    assert list(first["tiers"]) == ["device", "host", "redis", "store"]
    assert 0 <= first["kv_usage"] <= 1


def test_rows_of_a_running_batch(client: httpx.Client, stack: Stack) -> None:
    version = publish_text(client, "watched", "W: {x}")["version"]
    long = {"parameters": {"max_new_tokens": 100}, "inputs": stack.talkative()}
    seen = threading.Event()

    def ask(body: dict[str, Any]) -> None:
        while not seen.is_set():
            assert client.post("/generate", json=body).status_code == 200

    with ThreadPoolExecutor(4) as pool, snapshots(client) as stream:
        before = next(stream)["generated_tokens"]
        asking = [pool.submit(ask, body) for body in (long, long | {"task_id": "watched"}) * 2]
        try:
            busy = until(stream, lambda each: each["distinct_tasks"] == 2)
        finally:
            seen.set()
        for each in asking:
            each.result()
        after = until(stream, lambda each: not each["rows"] and each["first_token_ms"]["p50"] is not None)
    assert {(row["task"], row["version"]) for row in busy["rows"]} == {("watched", version), (None, None)}
    assert {row["phase"] for row in busy["rows"]} <= {"prefill", "decode"}
    assert len({row["row"] for row in busy["rows"]}) == len(busy["rows"]) == busy["batch_size"]
    assert after["generated_tokens"] > before
    assert 0 < after["first_token_ms"]["p50"] <= after["first_token_ms"]["p95"]


def test_readers_are_bounded_and_free_their_place(tmp_path: Path) -> None:
    with (
        running_stack(tmp_path / "store") as stack,
        serving(ServerState(services=services_of(stack))) as url,
        client_of(url) as client,
    ):
        opened = [client.stream("GET", "/ops/stream") for _ in range(MAX_READERS)]
        responses = [stream.__enter__() for stream in opened]
        assert {response.status_code for response in responses} == {200}
        assert error_of(client.get("/ops/stream"), 503)["code"] == "overloaded"
        for stream in opened:
            stream.__exit__(None, None, None)
        wait_until(
            lambda: client.stream("GET", "/ops/stream").__enter__().status_code == 200,
            "readers that left still hold their places",
        )


def test_draining_ends_it(tmp_path: Path) -> None:
    with running_stack(tmp_path / "store") as stack:
        state = ServerState(services=services_of(stack))
        with serving(state) as url, client_of(url) as client, snapshots(client) as stream:
            assert next(stream)["phase"] == "ready"
            state.draining = True
            *_, last = stream
            assert last["phase"] == "draining"


def test_nobody_watches_and_no_rows_are_put_down(client: httpx.Client, stack: Stack) -> None:
    body = {"inputs": stack.talkative(), "parameters": {"max_new_tokens": 1}}
    client.post("/generate", json=body)  # steps of requests before it are recorded when its answer is here
    stack.engine.take_rows()
    client.post("/generate", json=body)
    rows = wait_until(stack.engine.take_rows)
    assert rows is not None
    assert (len(rows), rows[0].num_generated, rows[0].is_prefill) == (1, 1, True), (
        "the first step after the call"
    )
    assert stack.engine.take_rows() is not rows, "they are given once"


def row(name: str) -> LiveRow:
    return LiveRow(name, "t", 1, False, 3)


def test_lanes_are_kept_while_a_request_runs_and_then_given_on() -> None:
    lanes = Lanes()
    assert [each["row"] for each in lanes.place((row("a"), row("b"), row("c")))] == [0, 1, 2]
    placed = lanes.place((row("c"), row("d"), row("e")))
    assert [(each["row"], each["request"]) for each in placed] == [(0, 4), (1, 5), (2, 3)]
    assert lanes.place(()) == []
    (again,) = lanes.place((row("an id of a client's"),))
    assert "client" not in str(again)


def test_a_lane_shows_what_the_encoder_reads() -> None:
    encoding, decoding = LiveRow("a", "t", 1, True, 1, 41, True), LiveRow("b", "t", 1, False, 3, 17)
    lanes = Lanes().place((encoding, decoding, row("c")))
    assert [each["phase"] for each in lanes] == ["encode", "decode", "decode"]
    assert [each["source"] for each in lanes] == [41, 17, None]
