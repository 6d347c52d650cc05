"""The short way to an endpoint: taken by plain bodies alone, and not to be told from FastAPI's own."""

import json
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute

from app.api.direct import SMALL_BYTES, DirectCall
from app.api.routes import decisions, generate, openai, responses, tokens

ROUTERS = (decisions.router, generate.router, openai.router, responses.router, tokens.router)
DIRECT = "application/json"
BY_FASTAPI = "application/json; charset=utf-8"
GENERATION = {"max_new_tokens": 4, "details": True}
BODIES: list[Any] = [
    {"inputs": "a b", "parameters": {**GENERATION, "seed": 1}},
    {"inputs": "a b", "parameters": {**GENERATION, "seed": 1}, "stream": True},
    {"inputs": "a" * SMALL_BYTES},
    {"inputs": "a", "parameters": {"temperature": "hot"}},
    {"inputs": ["a"], "wrong": 1},
    {"inputs": "a", "task_id": "there-is-none"},
    [],
    None,
    "a",
]


def answered(client: httpx.Client, path: str, body: bytes, coding: str) -> tuple[int, str]:
    answer = client.post(path, content=body, headers={"content-type": coding})
    return answer.status_code, answer.text


def test_all_posts_that_generate_have_it() -> None:
    routes = [route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)]
    assert {route.path for route in routes if DirectCall.of(route) is None} == {
        "/v1/models",
        "/v1/models/{model:path}",
    }


@pytest.mark.parametrize("body", BODIES, ids=lambda body: json.dumps(body)[:40])
def test_answers_and_errors_are_those_of_the_long_way(client: httpx.Client, body: Any) -> None:
    data = json.dumps(body).encode()
    assert answered(client, "/generate", data, DIRECT) == answered(client, "/generate", data, BY_FASTAPI)


@pytest.mark.parametrize("data", [b"", b"{", b"{}x", b"\xff", b'{"inputs": "a", "inputs": "b"}'])
def test_what_is_no_json_is_refused_in_the_same_words(client: httpx.Client, data: bytes) -> None:
    assert answered(client, "/generate", data, DIRECT) == answered(client, "/generate", data, BY_FASTAPI)


def test_unknown_queries_are_refused(client: httpx.Client) -> None:
    answer = client.post("/generate?seed=1", json={"inputs": "a"})
    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == "seed"


def test_a_header_that_a_route_declares_counts(client: httpx.Client) -> None:
    headers = {"x-request-deadline-ms": "never"}
    assert client.post("/generate", json={"inputs": "a"}, headers=headers).status_code == 422
