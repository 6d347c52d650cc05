"""Chains through /generate: the same as steps by hand, streamed, left and late in the middle."""

import json
import socket
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from app.api.state import ServerState
from app.keys.key import Scope
from tests.api.server import client_of, services_of, serving
from tests.api.test_generate import error_of, publish_text
from tests.api.test_keys import Keys
from tests.api.test_stream import events
from tests.serving.stack import Stack
from tests.serving.test_chain import END, SO_FAR
from tests.waiting import PATIENCE, wait_until

TASK, ENDLESS, MIXED = "chained", "endless", "mixed"
LENGTH = 120


@pytest.fixture(scope="module", autouse=True)
def tasks(url: str) -> None:
    chain = {"template": SO_FAR, "step_ends": END}
    with client_of(url) as client:
        publish_text(client, TASK, "{x}", chain=chain | {"max_steps": 4})
        publish_text(client, ENDLESS, "{x}", chain=chain | {"done": "@#", "max_steps": 64})
        steps = [{"task": TASK}, {"task": ENDLESS}]
        publish_text(client, MIXED, "{x}", chain=chain | {"max_steps": 3, "steps": steps})


def body(task: str = TASK, **parameters: Any) -> dict[str, Any]:
    return {"inputs": "name", "task_id": task, "parameters": {"max_new_tokens": LENGTH, **parameters}}


@pytest.mark.parametrize("more", [{}, {"do_sample": True, "seed": 11, "temperature": 0.7}])
def test_a_chain_is_its_steps_by_hand(client: httpx.Client, more: dict[str, Any]) -> None:
    answer = client.post("/generate", json=body(**more)).json()
    so_far, tokens, steps = "", list[dict[str, Any]](), list[str]()
    reads_otherwise = False
    for _ in range(4):
        rendered = SO_FAR.format(x="name", so_far=so_far)
        given = {"max_new_tokens": LENGTH - len(tokens), "stop": [END], "decoder_input_details": True, **more}
        step = client.post("/generate", json={"inputs": rendered, "parameters": given}).json()
        read = [token["id"] for token in step["details"]["prefill"]]
        reads_otherwise |= bool(tokens) and read[-len(tokens) :] != [token["id"] for token in tokens]
        tokens += step["details"]["tokens"]
        steps.append(step["generated_text"])
        so_far += steps[-1] + END
        if step["details"]["finish_reason"] != "stop_sequence":
            break
    assert [token["id"] for token in answer["details"]["tokens"]] == [token["id"] for token in tokens]
    assert answer["reasoning"]["text"] + END == so_far
    assert answer["reasoning"]["tokens"] == len(tokens)
    assert answer["generated_text"] == steps[-1].strip()
    assert reads_otherwise, "no text was generated in other tokens than those in which it is read"


def test_events_say_where_steps_end(client: httpx.Client) -> None:
    for asked in (body(), body(ENDLESS, max_new_tokens=30), body(MIXED)):
        whole = client.post("/generate", json=asked).json()
        found = list(events(client, asked))
        before = "".join(event["token"]["text"] for event in found if event.get("reasoning"))
        after = "".join(event["token"]["text"] for event in found if not event.get("reasoning"))
        assert (before, after) == (whole["reasoning"]["text"], whole["generated_text"])
        assert [event["step"] for event in found if "step" in event] == whole["reasoning"]["steps"]
        assert found[-1]["generated_text"] == whole["generated_text"]
        assert found[-1]["details"]["finish_reason"] == whole["details"]["finish_reason"]
        assert found[-1]["index"] == whole["details"]["generated_tokens"]


def test_a_step_of_a_task_that_the_key_does_not_reach_is_refused_first(
    stack: Stack, tmp_path_factory: pytest.TempPathFactory
) -> None:
    keys = Keys(tmp_path_factory.mktemp("keys") / "keys.json")
    few = keys.add("few", Scope.GENERATE, tasks=(MIXED, TASK))
    all_three = keys.add("all", Scope.GENERATE, tasks=(MIXED, TASK, ENDLESS))
    with serving(ServerState(services=services_of(stack)), keys=keys.ring) as url, client_of(url) as client:
        before = len(stack.outcomes)
        for path in ("/generate", "/generate_stream"):
            refused = client.post(path, json=body(MIXED), headers=few)
            assert ENDLESS in error_of(refused, 403)["message"]
        chat = {"model": MIXED, "messages": [{"role": "user", "content": "name"}]}
        error_of(client.post("/v1/chat/completions", json=chat, headers=few), 403)
        assert not any(outcome.generated_tokens for outcome in stack.outcomes[before:])
        task = json.dumps({"template": "{x}", "chain": {"template": SO_FAR, "steps": [{"task": ENDLESS}]}})
        author = keys.add("author", Scope.UPLOAD, tasks=(MIXED, TASK))
        uploaded = client.post(f"/tasks/{TASK}/versions", files={"task": (None, task)}, headers=author)
        assert ENDLESS in error_of(uploaded, 403)["message"]
        assert client.post("/generate", json=body(MIXED), headers=all_three).status_code == 200


@pytest.fixture(scope="module")
def long(url: str, tasks: None) -> dict[str, Any]:
    """A request with many steps, none of which has an answer."""
    with client_of(url) as client:
        for seed in range(40):
            asked = body(ENDLESS, do_sample=True, temperature=1.5, seed=seed)
            answer = client.post("/generate", json=asked).json()
            if answer["details"]["generated_tokens"] == LENGTH and len(answer["reasoning"]["steps"]) > 4:
                return asked
    raise AssertionError("all chains are short")


def test_a_client_that_leaves_in_the_middle_frees_all_in_two_steps(
    url: str, stack: Stack, long: dict[str, Any]
) -> None:
    wait_until(stack.is_idle)  # what stays resident is there since the request was found
    usage = stack.engine.stats().kv_usage
    for _ in range(50):
        before, steps = len(stack.outcomes), len(stack.steps)
        leave_after_two_steps(url, long)
        wait_until(lambda: stack.is_idle() and not stack.generation.limiter.taken)
        wait_until(lambda: stack.engine.stats().kv_usage <= usage)
        if stack.outcomes[-1].reason == "cancelled":
            break
    parts = stack.outcomes[before:]
    assert parts[-1].reason == "cancelled"
    # Each token takes a step, and so does each prompt, but for what was under way.
    assert len(stack.steps) - steps <= sum(part.generated_tokens for part in parts) + len(parts) + 2
    assert sum(part.generated_tokens for part in parts) < LENGTH


def leave_after_two_steps(url: str, asked: dict[str, Any]) -> None:
    data, where = json.dumps(asked).encode(), urlsplit(url)
    head = f"POST /generate_stream HTTP/1.1\r\nHost: localhost\r\ncontent-length: {len(data)}\r\n"
    head += "content-type: application/json\r\n\r\n"
    with socket.create_connection((where.hostname, where.port), timeout=PATIENCE) as connection:
        connection.sendall(head.encode() + data)
        received = b""
        while received.count(b'"step"') < 2:
            received += connection.recv(4096)


def test_a_deadline_passes_in_the_middle(client: httpx.Client, stack: Stack, long: dict[str, Any]) -> None:
    early, late = 0.0, 60_000.0  # deadlines in ms: before the second step, after the last one
    for _ in range(100):
        milliseconds = (early + late) / 2 if late - early > 1 else early * 2
        before = len(stack.outcomes)
        headers = {"x-request-deadline-ms": str(max(1, round(milliseconds)))}
        answer = client.post("/generate", json=long, headers=headers)
        wait_until(lambda: stack.is_idle() and not stack.generation.limiter.taken)
        parts = stack.outcomes[before:]
        if answer.status_code == 200:
            late = milliseconds
        elif len(parts) < 2:
            early = milliseconds
        else:
            assert error_of(answer, 504)["code"] == "deadline_exceeded"
            assert parts[-1].reason == "deadline"
            return
    raise AssertionError("no deadline fell between two steps")
