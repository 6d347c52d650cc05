import fnmatch
import json
import socket
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.serving.stack import BASE_NAME, POSITIONS, Stack
from tests.waiting import wait_until


def publish_text(client: httpx.Client, task_id: str, template: str, **more: Any) -> dict[str, Any]:
    task = json.dumps({"template": template, **more})
    response = client.post(f"/tasks/{task_id}/versions", files={"task": (None, task)})
    assert response.status_code in (200, 201), response.text
    return dict(response.json())


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert set(response.json()) - {"error_type"} == {"error"}
    error = dict(response.json()["error"])
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


def test_the_base_model(client: httpx.Client, stack: Stack) -> None:
    response = client.post("/generate", json={"inputs": "what a film", "parameters": {"max_new_tokens": 4}})
    assert response.status_code == 200
    body = response.json()
    assert {name: body[name] for name in ("task_id", "task_version", "version_digest")} == {
        "task_id": None,
        "task_version": None,
        "version_digest": None,
    }
    details = body["details"]
    assert details["finish_reason"] == "length"
    assert details["generated_tokens"] == len(details["tokens"]) == 4
    assert details["prompt_tokens"] == len(stack.tokenizer("what a film")["input_ids"])
    assert details["virtual_tokens"] == 0
    assert details["prefill"] == []
    assert "".join(token["text"] for token in details["tokens"]) == body["generated_text"]
    assert set(details["tokens"][0]) == {"id", "text", "logprob", "special"}
    for name in ("x-queue-time", "x-prefill-time", "x-decode-time", "x-total-time"):
        assert response.headers[name].isdigit()
    assert response.headers["x-generated-tokens"] == "4"
    assert response.headers["x-prompt-tokens"] == str(details["prompt_tokens"])


def test_a_task_by_every_name(client: httpx.Client) -> None:
    published = publish_text(client, "names", "Task: {x}")
    digest = published["version_digest"]
    for reference in ("names", "names@live", "names@1", f"names@{digest}"):
        body = client.post("/", json={"task_id": reference, "inputs": "a"}).json()[0]
        assert (body["task_id"], body["task_version"], body["version_digest"]) == ("names", 1, digest)
    by_adapter = client.post("/generate", json={"inputs": "a", "parameters": {"adapter_id": "names"}}).json()
    assert by_adapter["task_id"] == "names"
    error = error_of(
        client.post(
            "/generate", json={"task_id": "names", "inputs": "a", "parameters": {"adapter_id": "other"}}
        ),
        422,
    )
    assert "different tasks" in error["message"]
    assert client.post("/generate", json={"task_id": BASE_NAME, "inputs": "a"}).json()["task_id"] is None


def test_fields_of_a_template(client: httpx.Client) -> None:
    publish_text(client, "fields", "{name} eats {food}.")
    whole = client.post(
        "/generate",
        json={
            "task_id": "fields",
            "inputs": {"name": "{food}", "food": "<turn>"},
            "parameters": {"return_full_text": True, "details": False},
        },
    ).json()
    assert whole["generated_text"].startswith("{food} eats <turn>.")
    assert "details" not in whole
    error = error_of(client.post("/generate", json={"task_id": "fields", "inputs": "x"}), 422)
    assert error["param"] == "inputs"
    assert "name, food" in error["message"]


HABITS = {
    "n": 1,
    "best_of": 1,
    "typical_p": 1.0,
    "watermark": False,
    "grammar": None,
    "top_n_tokens": 0,
    "decoder_input_details": False,
    "choices": None,
}


def test_habits_are_fine_at_their_neutral_value(client: httpx.Client) -> None:
    body = {"inputs": "a", "stream": False, "user": "u-17", "parameters": HABITS}
    assert client.post("/generate", json=body).status_code == 200
    nulls = {
        "inputs": "a",
        "stream": None,
        "user": None,
        "task_id": None,
        "parameters": dict.fromkeys(HABITS),
    }
    assert client.post("/generate", json=nulls).status_code == 200


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("best_of", 2),
        ("watermark", True),
        ("watermark", 0),
    ],
)
def test_habits_are_refused_otherwise(client: httpx.Client, name: str, value: Any) -> None:
    error = error_of(client.post("/generate", json={"inputs": "a", "parameters": {name: value}}), 422)
    assert f"{name} is not supported" in error["message"]


@pytest.mark.parametrize(
    ("body", "param", "reason"),
    [
        ({}, "inputs", "required"),
        ({"inputs": 3}, "inputs", "string"),
        ({"inputs": "a", "taskid": "x"}, "taskid", "There is no field taskid; GET /openapi.json"),
        ({"inputs": "a", "vote": {"n": 3}}, "vote", "There is no field vote; send it as parameters.vote"),
        ({"inputs": "a", "parameters": {"vote": 3}}, "parameters.vote", 'must be an object such as {"n": 5}'),
        ({"inputs": "a", "parameters": {"max_tokens": 3}}, "parameters.max_tokens", "send max_new_tokens"),
        ({"inputs": "a", "parameters": {"top_p": 1.5}}, "parameters.top_p", "at most 1"),
        ({"inputs": "a", "parameters": {"temperature": 0}}, "parameters.temperature", "0.001"),
        ({"inputs": "a", "parameters": {"max_new_tokens": 0}}, "parameters.max_new_tokens", "from 1 to"),
        ({"inputs": "a", "parameters": {"seed": 2**63}}, "parameters.seed", f"to {2**63 - 1}"),
        ({"inputs": "a", "parameters": {"stop": ["a"] * 17}}, "parameters.stop", "at most 16"),
        ({"inputs": "a", "parameters": {"stop": ["a" * 257]}}, "parameters.stop.0", "at most 256"),
        ({"inputs": "a", "user": "u" * 257}, "user", "at most 256"),
        ({"inputs": "a", "task_id": "UP"}, "task_id", "lower-case"),
        ({"inputs": "a", "task_id": "../x"}, "task_id", "lower-case"),
        ({"inputs": "film " * 400}, "inputs", "positions"),
        ([], None, "JSON object"),
        (3, None, "JSON object"),
    ],
)
def test_bad_bodies(client: httpx.Client, body: Any, param: str | None, reason: str) -> None:
    error = error_of(client.post("/generate", json=body), 422)
    assert error["param"] == param
    assert reason in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("name", "values", "reason"),
    [
        ("max_new_tokens", (True, "5", 5.0, [5]), "must be a whole number from"),
        ("seed", (False, "1"), "must be a whole number from"),
        ("top_k", (True, "3"), "must be a whole number from"),
        ("truncate", (True, "3"), "must be a whole number from"),
        ("temperature", (True, "1", 10**400), "must be a number"),
        ("top_p", (True, "0.5"), "must be a number"),
        ("min_p", (False, "0.5"), "must be a number"),
        ("repetition_penalty", (True, "1"), "must be a number"),
        ("frequency_penalty", (True, "1"), "must be a number"),
        ("presence_penalty", (True, "1"), "must be a number"),
        ("do_sample", (1, 0, "yes", "true"), "must be true or false"),
        ("return_full_text", (1, "on"), "must be true or false"),
        ("details", (1, "no"), "valid boolean"),
    ],
)
def test_numbers_and_booleans_are_what_they_say(
    client: httpx.Client, name: str, values: tuple[Any, ...], reason: str
) -> None:
    for value in values:
        error = error_of(client.post("/generate", json={"inputs": "a", "parameters": {name: value}}), 422)
        assert error["param"] == f"parameters.{name}"
        assert reason in error["message"]


def test_a_whole_number_is_a_number(client: httpx.Client) -> None:
    whole = {"temperature": 1, "top_p": 1, "min_p": 0, "repetition_penalty": 1, "frequency_penalty": 0}
    parameters = whole | {"presence_penalty": -1, "max_new_tokens": 1, "do_sample": True, "typical_p": 1}
    assert client.post("/generate", json={"inputs": "a", "parameters": parameters}).status_code == 200


def test_too_many_new_tokens_says_the_numbers(client: httpx.Client) -> None:
    body = {"inputs": "a", "parameters": {"max_new_tokens": POSITIONS}}
    error = error_of(client.post("/generate", json=body), 422)
    assert error["code"] == "request_too_long"
    assert f"0 virtual + 2 prompt + {POSITIONS} new tokens" in error["message"]


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b'{"inputs": "a"', "application/json", 422),
        (b'{"inputs": "\xff"}', "application/json", 400),
        (b'{"inputs": "\\ud800"}', "application/json", 422),
        (b'{"\\ud800": "a"}', "application/json", 422),
        (b"[" * 100_000, "application/json", 400),
        (b'{"inputs": "a"}', "text/plain", 422),
        (b"", "application/json", 422),
    ],
)
def test_bodies_that_are_no_json(client: httpx.Client, content: bytes, kind: str, status: int) -> None:
    response = client.post("/generate", content=content, headers={"content-type": kind})
    assert error_of(response, status)["message"]


WRONG_INPUTS = "inputs must be a string, or an object with the template's fields."


@pytest.mark.parametrize(
    ("content", "param", "message"),
    [
        (b"{nope", None, "The body is not JSON: Expecting property name * at character 1."),
        (b'{"inputs": "a"', None, "The body is not JSON: * at character 14."),
        (b'{"inputs": "a', None, "The body is not JSON: Unterminated string starting at character 11."),
        (b"", None, "The body must be a JSON object, *"),
        (b'{"inputs": "a", "parameters": {"stop": [""]}}', "parameters.stop.0", "* at least 1 character."),
        (
            b'{"inputs": "a", "parameters": {"temperature": NaN}}',
            "parameters.temperature",
            "parameters.temperature must be a number from 0.001 to 100 (for greedy decoding *",
        ),
        (
            b'{"inputs": "a", "parameters": {"top_p": 1e999}}',
            "parameters.top_p",
            "parameters.top_p must be a number above 0, at most 1.",
        ),
        (b'{"inputs": 3}', "inputs", WRONG_INPUTS),
        (b'{"inputs": null}', "inputs", WRONG_INPUTS),
        (b'{"inputs": ["a"]}', "inputs", WRONG_INPUTS),
        (
            b'{"inputs": {"strength": 3}}',
            "inputs.strength",
            "inputs.strength: Input should be a valid string.",
        ),
    ],
)
def test_one_problem_is_told_once(
    client: httpx.Client, content: bytes, param: str | None, message: str
) -> None:
    error = error_of(
        client.post("/generate", content=content, headers={"content-type": "application/json"}), 422
    )
    assert error["param"] == param
    assert fnmatch.fnmatchcase(error["message"], message), error["message"]
    assert "; " not in error["message"]


def test_unknown_tasks_and_routes(client: httpx.Client) -> None:
    error = error_of(client.post("/generate", json={"task_id": "nobody", "inputs": "a"}), 404)
    assert error["message"] == "There is no task 'nobody'; GET /tasks lists them."
    assert error_of(client.get("/tasks/nobody"), 404)["message"] == error["message"]
    publish_text(client, "somebody", "{x}")
    error = error_of(client.post("/generate", json={"task_id": "somebody@9", "inputs": "a"}), 404)
    assert "GET /tasks" not in error["message"]
    assert "GET /openapi.json" in error_of(client.get("/nowhere"), 404)["message"]
    assert error_of(client.get("/generate"), 405)["code"] == "method_not_allowed"
    assert error_of(client.delete("/tasks"), 405)["code"] == "method_not_allowed"


def test_request_ids(client: httpx.Client) -> None:
    for given, echoed in (("abc-1.2_3:4", True), ("a b", False), ("x" * 129, False), ("é".encode(), False)):
        answered = client.get(
            "/version", headers=[(b"x-request-id", given if isinstance(given, bytes) else given.encode())]
        )
        made = answered.headers["x-request-id"]
        assert (made == given) is echoed
        assert made
    assert len(client.get("/nowhere").headers["x-request-id"]) == 32
    same = {"x-request-id": "twice"}
    for _ in range(2):
        assert client.post("/generate", json={"inputs": "a"}, headers=same).headers["x-request-id"] == "twice"


def test_deadlines(client: httpx.Client, stack: Stack) -> None:
    late = client.post(
        "/generate", json={"inputs": stack.talkative()}, headers={"x-request-deadline-ms": "20"}
    )
    assert error_of(late, 504)["code"] == "deadline_exceeded"
    for bad in ("0", "-1", "soon", "86400001"):
        refused = client.post("/generate", json={"inputs": "a"}, headers={"x-request-deadline-ms": bad})
        assert "X-Request-Deadline-Ms" in str(error_of(refused, 422)["param"])


def test_a_client_that_leaves_frees_its_row(url: str, stack: Stack) -> None:
    body = json.dumps({"inputs": stack.talkative()}).encode()
    kind = "Content-Type: application/json"
    head = f"POST /generate HTTP/1.1\r\nHost: localhost\r\n{kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    before = len(stack.outcomes)
    wait_until(stack.is_idle, "what talked before still runs")
    with socket.create_connection(("127.0.0.1", urlsplit(url).port or 0)) as connection:
        connection.sendall(head.encode() + body)
        wait_until(lambda: stack.engine.stats().num_running or len(stack.outcomes) > before)
    wait_until(lambda: len(stack.outcomes) > before)
    assert stack.outcomes[-1].reason == "cancelled"
    wait_until(stack.is_idle)


def test_tokenize_and_back(client: httpx.Client, stack: Stack) -> None:
    publish_text(client, "tokenized", "Review: {text} 🙂")
    answer = client.post("/tokenize", json={"task_id": "tokenized", "inputs": "the <s> film é"}).json()
    text = "Review: the <s> film é 🙂"
    assert answer["text"] == text
    ids = [token["id"] for token in answer["tokens"]]
    generated = client.post("/generate", json={"task_id": "tokenized", "inputs": "the <s> film é"}).json()
    assert answer["prompt_tokens"] == len(ids) == generated["details"]["prompt_tokens"]
    bos = stack.tokenizer.bos_token
    assert "".join(token["text"] for token in answer["tokens"]) == bos + text
    assert client.post("/detokenize", json={"ids": ids}).json() == {"text": text}
    assert client.post("/detokenize", json={"ids": []}).json() == {"text": ""}
    error_of(client.post("/detokenize", json={"ids": [10**9]}), 422)
    error_of(client.post("/detokenize", json={"ids": [10**30]}), 422)
    assert client.post("/detokenize", json={"ids": [1] * POSITIONS}).status_code == 200
    error = error_of(client.post("/detokenize", json={"ids": [1] * (POSITIONS + 1)}), 422)
    assert (error["code"], error["param"]) == ("request_too_long", "ids")
    error_of(client.post("/tokenize", json={"task_id": "nobody", "inputs": "a"}), 404)


def test_samples_share_a_seed_and_differ(client: httpx.Client, stack: Stack) -> None:
    publish_text(client, "sampled", "Say: {text}")
    parameters = {"n": 5, "do_sample": True, "max_new_tokens": 8, "seed": 11}
    body = {"task_id": "sampled", "inputs": "the film was", "parameters": parameters}
    answer = client.post("/generate", json=body).json()
    texts = [sample["generated_text"] for sample in answer["samples"]]
    assert len(texts) == 5
    assert len(set(texts)) > 1
    assert {sample["details"]["seed"] for sample in answer["samples"]} == {11}
    assert answer["generated_text"] == texts[0]
    alone = client.post("/generate", json=body | {"parameters": parameters | {"n": 1}}).json()
    assert "samples" not in alone
    assert alone["generated_text"] == texts[0], "the first sample is the answer of a request for one"
    greedy = {"task_id": "sampled", "inputs": "the film was", "parameters": {"n": 3, "max_new_tokens": 8}}
    same = client.post("/generate", json=greedy).json()
    one = client.post("/generate", json=greedy | {"parameters": {"max_new_tokens": 8}}).json()
    assert {sample["generated_text"] for sample in same["samples"]} == {one["generated_text"]}
    error_of(client.post("/generate_stream", json=greedy | {"stream": True}), 422)
    error_of(client.post("/generate", json=greedy | {"parameters": {"n": 17}}), 422)
