"""Reasoning through /generate: answers and events have the steps apart, and stay TGI's."""

from typing import Any

import httpx
import pytest
from huggingface_hub import InferenceClient

from tests.api.server import client_of
from tests.api.test_generate import error_of, publish_text
from tests.api.test_stream import events
from tests.serving.stack import Stack

LENGTH = 50
TASK = "thinks"


@pytest.fixture(scope="module")
def asked(url: str, stack: Stack) -> dict[str, Any]:
    """A request whose answer has a marker, which spans tokens, and ends of steps."""
    with client_of(url) as client:
        return thinking(client, stack, TASK)


def thinking(client: httpx.Client, stack: Stack, task: str) -> dict[str, Any]:
    """Publish a task with reasoning, and return a request that brings its marker about."""
    body = {"inputs": stack.talkative(), "parameters": {"max_new_tokens": LENGTH}}
    text = client.post("/generate", json=body).json()["generated_text"]
    marker = next(text[i : i + 4] for i in range(30, 60) if text.index(text[i : i + 4]) == i)
    settings = {"answer_after": marker, "steps_end": text[6], "effort": {"low": 5}}
    publish_text(client, task, "{x}", reasoning=settings)
    return body | {"task_id": task}


def with_parameters(body: dict[str, Any], **more: Any) -> dict[str, Any]:
    return body | {"parameters": body["parameters"] | more}


def test_steps_stand_beside_the_answer(client: httpx.Client, asked: dict[str, Any]) -> None:
    plain = client.post("/generate", json=asked | {"task_id": "tiny-base"}).json()
    answer = client.post("/generate", json=asked).json()
    before, text = answer["reasoning"], plain["generated_text"]
    assert text.startswith(before["text"])
    assert answer["generated_text"] == text[len(before["text"]) + 4 :].lstrip()
    assert len(before["steps"]) > 1
    assert all(step in before["text"] for step in before["steps"])
    assert answer["details"]["tokens"] == plain["details"]["tokens"]
    assert answer["details"]["finish_reason"] == "length"

    hidden = client.post("/generate", json=with_parameters(asked, include_reasoning=False)).json()
    assert "reasoning" not in hidden
    assert hidden["generated_text"] == answer["generated_text"]
    assert hidden["details"]["generated_tokens"] == LENGTH
    assert hidden["details"]["tokens"] == answer["details"]["tokens"][before["tokens"] :]

    cut = client.post("/generate", json=with_parameters(asked, reasoning_effort="low", n=2, do_sample=True))
    assert [each["reasoning"]["tokens"] for each in cut.json()["samples"]] == [5, 5]


def test_events_say_what_comes_before_the_answer(client: httpx.Client, asked: dict[str, Any]) -> None:
    for given in ({}, {"thinking_token_budget": 7}, {"thinking_token_budget": 0}, {"max_new_tokens": 9}):
        body = with_parameters(asked, **given)
        whole = client.post("/generate", json=body).json()
        found = list(events(client, body))
        texts = {True: "", False: ""}
        for event in found:
            texts[event.get("reasoning", False)] += event["token"]["text"]
        assert texts == {True: whole["reasoning"]["text"], False: whole["generated_text"]}
        assert [event["step"] for event in found if "step" in event] == whole["reasoning"]["steps"]
        assert found[-1]["generated_text"] == whole["generated_text"]
        assert found[-1]["details"]["finish_reason"] == whole["details"]["finish_reason"]
        assert found[-1]["index"] == whole["details"]["generated_tokens"]
        assert len({event["index"] for event in found}) == found[-1]["index"]
    hidden = list(events(client, with_parameters(asked, include_reasoning=False)))
    answer = client.post("/generate", json=asked).json()
    assert not any(event.get("reasoning") or "step" in event for event in hidden)
    assert "".join(event["token"]["text"] for event in hidden) == answer["generated_text"]
    assert hidden[-1]["index"] == LENGTH


def test_clients_of_tgi_read_the_events(
    url: str, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # this server is no hub
    hub = InferenceClient(model=url)
    given = {"max_new_tokens": LENGTH, "adapter_id": TASK}
    answer = hub.text_generation(asked["inputs"], **given)
    *_, last = hub.text_generation(asked["inputs"], **given, stream=True, details=True)
    assert last.generated_text == answer


def test_what_would_have_no_effect_is_refused_for_all_routes(client: httpx.Client) -> None:
    refused = client.post("/generate", json={"inputs": "a", "parameters": {"reasoning_effort": "low"}})
    assert error_of(refused, 422)["param"] == "parameters.reasoning_effort"
    chat = {"model": "tiny-base", "prompt": "a", "thinking_token_budget": 4}
    assert "no reasoning" in error_of(client.post("/v1/completions", json=chat), 422)["message"]
    neutral = chat | {"thinking_token_budget": -1, "reasoning_effort": "none", "max_tokens": 2}
    assert client.post("/v1/completions", json=neutral).status_code == 200
