"""Votes over HTTP: ballots beside the answer, an event for each, all tokens counted; refusals say why."""

import json
from typing import Any

import httpx
import pytest
from huggingface_hub import InferenceClient

from tests.api.server import client_of
from tests.api.test_generate import error_of, publish_text
from tests.api.test_stream import events
from tests.serving.stack import BASE_NAME, Stack
from tests.waiting import wait_until

WARM = {"max_new_tokens": 6, "seed": 11, "temperature": 3.0}
VOTE = {"inputs": "what a film", "parameters": WARM | {"vote": {"n": 5}}}


def test_an_answer_has_its_ballots(client: httpx.Client) -> None:
    response = client.post("/generate", json=VOTE)
    answer, vote = response.json(), response.json()["vote"]
    samples = client.post(
        "/generate", json={"inputs": "what a film", "parameters": WARM | {"n": 5, "do_sample": True}}
    ).json()["samples"]
    assert [ballot["answer"] for ballot in vote["ballots"]] == [each["generated_text"] for each in samples]
    assert [ballot["index"] for ballot in vote["ballots"]] == list(range(5))
    assert vote["winner"] == answer["generated_text"] in {ballot["answer"] for ballot in vote["ballots"]}
    assert 1 / 5 <= vote["share"] <= 1
    assert set(vote["ballots"][0]) == {
        *("index", "answer", "weight", "finish_reason", "generated_tokens", "version")
    }
    tokens = sum(ballot["generated_tokens"] for ballot in vote["ballots"])
    assert response.headers["x-generated-tokens"] == str(tokens)
    assert response.headers["x-prompt-tokens"] == str(answer["details"]["prompt_tokens"])
    assert answer["details"]["generated_tokens"] == len(answer["details"]["tokens"])
    assert "samples" not in answer


def test_a_stream_has_an_event_for_each_ballot_and_ends_with_the_winner(client: httpx.Client) -> None:
    whole = client.post("/generate", json=VOTE).json()
    *cast, last = events(client, VOTE)
    assert [event["index"] for event in (*cast, last)] == [1, 2, 3, 4, 5, 6]
    assert {event["token"]["text"] for event in cast} == {""}
    assert all((event["generated_text"], event["details"]) == (None, None) for event in cast)
    in_order = sorted((event["ballot"] for event in cast), key=lambda ballot: ballot["index"])
    assert in_order == whole["vote"]["ballots"] == last["vote"]["ballots"]
    assert last["token"]["text"] == last["generated_text"] == whole["generated_text"]
    assert last["details"]["finish_reason"] == whole["details"]["finish_reason"]


def test_the_hubs_client_reads_the_winner(
    url: str, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`huggingface_hub.InferenceClient`, unchanged, of a task that votes by itself."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # this server is no hub
    publish_text(client, "hub-voting", "T: {x}", vote={"n": 3}, defaults={"temperature": 3.0})
    hub, more = InferenceClient(model=url), {"adapter_id": "hub-voting", "seed": 3, "max_new_tokens": 4}
    pieces = list(hub.text_generation("film", **more, details=True, stream=True))
    body = {"task_id": "hub-voting", "inputs": "film", "parameters": {"seed": 3, "max_new_tokens": 4}}
    answer = client.post("/generate", json=body).json()
    assert len(pieces) == 4
    assert "".join(piece.token.text for piece in pieces) == answer["generated_text"]
    assert pieces[-1].generated_text == answer["vote"]["winner"] == hub.text_generation("film", **more)
    assert {ballot["version"] for ballot in answer["vote"]["ballots"]} == {1}


@pytest.mark.parametrize(
    ("parameters", "what"),
    [
        ({"vote": {"n": 3}, "n": 2}, "leave n out"),
        ({"vote": {"n": 3}, "choices": ["a", "b"]}, "leave choices out"),
        ({"vote": {"n": 3}, "do_sample": False}, "leave out do_sample: false"),
        ({"vote": {"n": 3}, "num_beams": 2}, "leave num_beams out"),
        ({"vote": {"n": 65}}, "64"),
        ({"vote": {"n": 0}}, "1"),
        ({"vote": {}}, "n"),
        ({"vote": {"n": 3, "by": "text"}}, "answer"),
    ],
)
def test_what_cannot_be_voted_on_is_refused(
    client: httpx.Client, parameters: dict[str, Any], what: str
) -> None:
    error = error_of(client.post("/generate", json={"inputs": "a", "parameters": parameters}), 422)
    assert error["param"].startswith("parameters.vote")
    assert what in error["message"]


def test_openais_routes_vote(client: httpx.Client) -> None:
    body = {"model": BASE_NAME, "max_tokens": 6, "seed": 11, "temperature": 3.0, "vote": {"n": 5}}
    whole = client.post("/generate", json=VOTE).json()
    answer = client.post("/v1/completions", json=body | {"prompt": "what a film"}).json()
    assert [choice["text"] for choice in answer["choices"]] == [whole["generated_text"]]
    tokens = sum(ballot["generated_tokens"] for ballot in whole["vote"]["ballots"])
    assert answer["usage"]["completion_tokens"] == tokens
    assert answer["usage"]["prompt_tokens"] == whole["details"]["prompt_tokens"]
    greedy = client.post("/v1/completions", json=body | {"prompt": "a", "temperature": 0})
    assert "temperature 0" in error_of(greedy, 422)["message"]
    many = client.post("/v1/completions", json=body | {"prompt": ["a", "b", "c"], "vote": {"n": 64}})
    assert error_of(many, 422)["param"] == "n"


def stream_of(client: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    options = {"include_usage": True, "continuous_usage_stats": True}
    text = client.post(path, json=body | {"stream": True, "stream_options": options}).text
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if "{" in line]


def test_openais_streams_end_as_whole_answers_do(client: httpx.Client) -> None:
    publish_text(client, "chatty", "T: {x}", vote={"n": 3}, defaults={"temperature": 3.0})
    body = {"model": "chatty", "max_tokens": 6, "seed": 11}
    chat = body | {"messages": [{"role": "user", "content": "a film"}], "logprobs": True}
    text = body | {"prompt": "a film", "logprobs": 1, "echo": True}
    for path, asked in (("/v1/chat/completions", chat), ("/v1/completions", text)):
        whole = client.post(path, json=asked).json()
        *chunks, last = stream_of(client, path, asked)
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        [expected] = whole["choices"]
        assert sorted(each["ballot"]["index"] for each in choices if "ballot" in each) == [0, 1, 2]
        assert last["usage"] == chunks[-1]["usage"] == whole["usage"]
        assert choices[-1]["vote"] == expected["vote"]
        found = [each["logprobs"] for each in choices if each["logprobs"]]
        assert found == [expected["logprobs"]]
        texts = [each.get("text", each.get("delta", {}).get("content", "")) for each in choices]
        assert "".join(texts) == expected.get("text", expected.get("message", {}).get("content"))


def test_a_deadline_amid_a_vote_is_504(client: httpx.Client, stack: Stack) -> None:
    given = {"vote": {"n": 64}, "max_new_tokens": 200, "ignore_eos": True}
    body = {"inputs": stack.talkative(), "parameters": given}
    for path in ("/generate", "/generate_stream"):
        late = client.post(path, json=body, headers={"x-request-deadline-ms": "200"})
        if late.status_code == 200:  # the first ballot came in before
            assert '"deadline_exceeded"' in late.text
        else:
            assert late.status_code == 504
    wait_until(lambda: stack.is_idle() and not stack.generation.limiter.taken)


def test_a_client_that_leaves_amid_a_vote_frees_all_rows(client: httpx.Client, stack: Stack) -> None:
    body = {"inputs": stack.talkative(), "parameters": {"vote": {"n": 64}, "max_new_tokens": 60}}
    with client.stream("POST", "/generate_stream", json=body) as response:
        first = next(line for line in response.iter_lines() if line)
        assert json.loads(first.removeprefix("data: "))["ballot"]["finish_reason"]
    wait_until(lambda: stack.is_idle() and not stack.generation.limiter.taken)


@pytest.fixture(scope="module")
def two(url: str) -> str:
    """Two versions, `live` of which are both."""
    with client_of(url) as client:
        for template in ("one {x}", "two: {x}"):
            publish_text(client, "pair", template, choices=["film", "food"])
        both = {"weights": {"1": 1, "2": 3}, "ensemble": True}
        assert client.put("/tasks/pair/aliases/live", json=both).status_code == 200
    return "pair"


def test_all_versions_of_an_ensemble_answer(client: httpx.Client, two: str) -> None:
    body = {"inputs": "what a film", "parameters": {"max_new_tokens": 6}}
    response = client.post("/generate", json=body | {"task_id": two})
    answer, vote = response.json(), response.json()["vote"]
    first, second = (client.post("/generate", json=body | {"task_id": f"{two}@{n}"}).json() for n in (2, 1))
    assert [(each["version"], each["answer"], each["weight"]) for each in vote["ballots"]] == [
        (2, first["generated_text"], 3),
        (1, second["generated_text"], 1),
    ]
    assert (answer["task_version"], answer["version_digest"]) == (2, first["version_digest"])
    assert answer["generated_text"] == first["generated_text"] == vote["winner"]
    details = [each["details"] for each in (first, second)]
    assert response.headers["x-generated-tokens"] == str(sum(each["generated_tokens"] for each in details))
    assert response.headers["x-prompt-tokens"] == str(sum(each["prompt_tokens"] for each in details))
    *cast, last = events(client, body | {"task_id": two})
    assert sorted(event["ballot"]["version"] for event in cast) == [1, 2]
    assert last["generated_text"] == answer["generated_text"]
    assert last["vote"] == vote


def test_of_choices_an_ensemble_has_the_mean(client: httpx.Client, two: str) -> None:
    body = {"inputs": "what a film", "parameters": {"choices": True}}
    answer = client.post("/generate", json=body | {"task_id": two}).json()
    singles = [client.post("/generate", json=body | {"task_id": f"{two}@{n}"}).json() for n in (1, 2)]
    found = {each["value"]: each["probability"] for each in answer["choice"]["probabilities"]}
    for value in ("film", "food"):
        one, other = (
            next(p["probability"] for p in each["choice"]["probabilities"] if p["value"] == value)
            for each in singles
        )
        assert found[value] == pytest.approx((one + 3 * other) / 4, abs=1e-6)
    assert answer["generated_text"] == answer["choice"]["value"] == max(found, key=found.__getitem__)
    assert [each["answer"] for each in answer["vote"]["ballots"]] == [
        each["generated_text"] for each in reversed(singles)
    ]


def test_openais_fingerprint_names_all_versions(client: httpx.Client, two: str) -> None:
    body = {"model": two, "messages": [{"role": "user", "content": "a film"}], "max_tokens": 4}
    whole = client.post("/v1/chat/completions", json=body | {"temperature": 0}).json()
    assert whole["system_fingerprint"].endswith(f"-{two}@1+2")
    stream = client.post("/v1/chat/completions", json=body | {"stream": True}).text
    *chunks, _ = (json.loads(line.removeprefix("data: ")) for line in stream.splitlines() if "{" in line)
    assert {chunk["system_fingerprint"] for chunk in chunks} == {whole["system_fingerprint"]}
    refused = client.post("/v1/chat/completions", json=body | {"n": 2})
    assert error_of(refused, 422)["param"] == "n"
