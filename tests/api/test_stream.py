"""Server-sent events: joined they are the answer, errors have their status, leaving frees the row."""

import json
import random
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import ValidationError

from tests.api.server import client_of
from tests.api.test_generate import error_of, publish_text
from tests.serving.stack import POSITIONS, Stack
from tests.waiting import PATIENCE, wait_until

INPUTS = ("the film", "食べ物は美味しい", "🙂🙃👩‍👩‍👧", "Grüße aus", "a\nb", "name[The Eagle]")
STOPS = ("e", "the", "\n", "ea", "漢", "a b", "é")


def events(client: httpx.Client, body: dict[str, Any], path: str = "/generate_stream") -> Iterator[Any]:
    with client.stream("POST", path, json=body) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line:
                assert line.startswith("data: ")
                yield json.loads(line.removeprefix("data: "))


def test_the_shape_is_tgis(client: httpx.Client) -> None:
    body = {"inputs": "what a film", "parameters": {"max_new_tokens": 5, "seed": 3}}
    for path, more in (("/generate_stream", {}), ("/generate", {"stream": True}), ("/", {"stream": True})):
        *early, last = events(client, body | more, path)
        assert [event["index"] for event in (*early, last)] == [1, 2, 3, 4, 5]
        assert all((event["generated_text"], event["details"]) == (None, None) for event in early)
        assert set(last["token"]) == {"id", "text", "logprob", "special"}
        assert last["generated_text"] == client.post("/generate", json=body).json()["generated_text"]
        assert last["details"]["finish_reason"] == "length"
        assert (last["details"]["generated_tokens"], last["details"]["seed"]) == (5, 3)


@pytest.mark.parametrize("parameters", [{"choices": ["a", "b"]}, {"n": 2}])
def test_what_a_stream_cannot_hold_is_refused(client: httpx.Client, parameters: dict[str, Any]) -> None:
    body = {"inputs": "what a film", "parameters": parameters}
    for path, more in (("/generate_stream", {}), ("/generate", {"stream": True})):
        assert "stream" in error_of(client.post(path, json=body | more), 422)["message"]
    assert error_of(client.post("/generate_stream", json=body | {"stream": False}), 422)["param"] == "stream"


@pytest.mark.slow
@pytest.mark.parametrize("count", [100, pytest.param(500, marks=pytest.mark.soak)])
def test_streams_joined_are_the_answer(client: httpx.Client, count: int) -> None:
    """Random requests, with text of many kinds and stop strings that span tokens; one at a time.

    (In company sums are rounded otherwise, and a draw may fall on the other side of a border.)
    """
    dice = random.Random(5)
    reasons = [compare(client, random_body(dice)) for _ in range(count)]
    assert reasons.count("stop_sequence") > count // 10
    assert reasons.count("length") > count // 10


def random_body(dice: random.Random) -> dict[str, Any]:
    parameters: dict[str, Any] = {"max_new_tokens": dice.randint(1, 16), "seed": dice.randrange(1000)}
    parameters |= {"do_sample": dice.random() < 0.7, "temperature": 1.5}
    parameters |= {"stop": dice.sample(STOPS, dice.randint(0, 3))}
    return {"inputs": dice.choice(INPUTS), "parameters": parameters}


def compare(client: httpx.Client, body: dict[str, Any]) -> str:
    """Why both ended."""
    answer = client.post("/generate", json=body).json()
    *early, last = events(client, body)
    text = "".join(event["token"]["text"] for event in (*early, last))
    assert text == answer["generated_text"] == last["generated_text"]
    assert not any(stop in text for stop in body["parameters"]["stop"])
    tokens = [event["token"]["id"] for event in (*early, last)]
    assert tokens == [token["id"] for token in answer["details"]["tokens"]]
    assert last["details"]["finish_reason"] == answer["details"]["finish_reason"]
    return str(last["details"]["finish_reason"])


def test_early_failures_have_their_own_status(client: httpx.Client) -> None:
    missing = client.post("/generate_stream", json={"inputs": "a", "task_id": "nobody"})
    assert error_of(missing, 404)["code"] == "not_found"
    too_long = {"inputs": "a", "parameters": {"max_new_tokens": POSITIONS}}
    assert error_of(client.post("/generate_stream", json=too_long), 422)["code"] == "request_too_long"
    mistyped = error_of(client.post("/generate_stream", json={"input": "a"}), 422)
    assert "input" in mistyped["message"]


@pytest.mark.slow
def test_a_late_failure_is_an_event(client: httpx.Client, stack: Stack) -> None:
    body = {"inputs": stack.talkative(), "parameters": {"max_new_tokens": POSITIONS - 60}}
    early, late = 0.0, 60_000.0  # deadlines in ms: before the first token, after the last one
    for _ in range(100):
        milliseconds = (early + late) / 2 if late - early > 1 else early * 2
        headers = {"x-request-deadline-ms": str(max(1, round(milliseconds)))}
        with client.stream("POST", "/generate_stream", json=body, headers=headers) as response:
            *_, last = [line for line in response.iter_lines() if line]
        if response.status_code == 504:
            early = milliseconds
        elif "error" in (event := json.loads(last.removeprefix("data: "))):
            assert event["error"]["code"] == "deadline_exceeded"
            return
        else:
            late = milliseconds
    raise AssertionError("no deadline fell between the first token and the last one")


def test_the_version_is_told(client: httpx.Client) -> None:
    published = publish_text(client, "streamed", "S: {x}")
    *_, last = events(client, {"task_id": "streamed", "inputs": "a"})
    assert last["details"]["version_digest"] == published["version_digest"]


def test_clients_that_leave_free_their_rows(url: str, stack: Stack) -> None:
    """100 of them, at random moments."""
    dice = random.Random(1)
    where = urlsplit(url)
    body = {"inputs": stack.talkative(), "parameters": {"max_new_tokens": 150}}

    def leave(seconds: float) -> None:
        data = json.dumps(body).encode()
        head = f"POST /generate_stream HTTP/1.1\r\nHost: localhost\r\ncontent-length: {len(data)}\r\n"
        head += "content-type: application/json\r\n\r\n"
        with socket.create_connection((where.hostname, where.port), timeout=PATIENCE) as connection:
            connection.sendall(head.encode() + data)
            time.sleep(seconds)

    with ThreadPoolExecutor(25) as threads:
        list(threads.map(leave, [dice.uniform(0, 0.3) for _ in range(100)]))
    wait_until(stack.is_idle, "rows of clients that left still run")
    with client_of(url) as client:  # the loop checks its integrity whenever it comes to rest
        assert client.post("/generate", json={"inputs": "a"}).status_code == 200


def test_the_hubs_client(url: str, client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """`huggingface_hub.InferenceClient`, unchanged."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # this server is no hub
    hub = InferenceClient(model=url)
    body = {"inputs": "what a film", "parameters": {"max_new_tokens": 6}}
    expected = client.post("/generate", json=body).json()
    assert hub.text_generation("what a film", max_new_tokens=6) == expected["generated_text"]
    detailed = hub.text_generation("what a film", max_new_tokens=6, details=True, seed=1, stop=["zzz"])
    assert detailed.details is not None
    assert detailed.details.generated_tokens == expected["details"]["generated_tokens"]
    assert [token.id for token in detailed.details.tokens] == [
        token["id"] for token in expected["details"]["tokens"]
    ]
    pieces = list(hub.text_generation("what a film", max_new_tokens=6, stream=True, details=True))
    assert "".join(piece.token.text for piece in pieces) == expected["generated_text"]
    assert pieces[-1].generated_text == expected["generated_text"]
    assert pieces[-1].details is not None
    assert pieces[-1].details.finish_reason == expected["details"]["finish_reason"]
    with pytest.raises(ValidationError, match="256 positions"):
        hub.text_generation("a", max_new_tokens=10 * POSITIONS)
