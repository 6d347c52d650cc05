"""Keys at the edge: every route, every scope, every way around, quotas, and who is on record."""

import asyncio
import base64
import itertools
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi.routing import iter_route_contexts

from app.api.app import create_app
from app.api.auth.authenticator import declared_access
from app.api.state import ApiConfig, ServerState
from app.keys.key import Key, Scope, hash_of, new_key_text
from app.keys.key_file import change_keys
from app.keys.keyring import Keyring
from tests.api.server import client_of, raw_exchange, services_of, serving
from tests.api.test_generate import error_of
from tests.serving.stack import BASE_NAME, Stack

PUBLIC = {(method, path) for method in ("GET", "HEAD") for path in ("/health/live", "/health/ready")}
METHODS = ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE", "TRACE")
LISTING = {Scope.GENERATE, Scope.UPLOAD, Scope.ADMIN}
# As API.md has them; a route that isn't here fails the test below.
IS_IT = {"type": "predicate", "instructions": "Is it?"}
NEEDED: dict[tuple[str, str], set[Scope]] = {
    **{
        ("POST", path): {Scope.GENERATE}
        for path in (
            "/",
            "/generate",
            "/generate_stream",
            "/tokenize",
            "/detokenize",
            "/v1/completions",
            "/v1/chat/completions",
            "/v1/responses",
            "/v1/decisions",
        )
    },
    **{("GET", path): LISTING | {Scope.TRAIN} for path in ("/tasks", "/tasks/{task_id}")},
    **{("GET", path): LISTING for path in ("/v1/models", "/v1/models/{model}")},
    ("POST", "/tasks/{task_id}/training-runs"): {Scope.TRAIN},
    ("POST", "/tasks/{task_id}/training-runs/check"): {Scope.TRAIN},
    ("GET", "/tasks/{task_id}/training-runs"): {Scope.TRAIN},
    ("GET", "/tasks/{task_id}/training-runs/{run_id}"): {Scope.TRAIN},
    ("DELETE", "/tasks/{task_id}/training-runs/{run_id}"): {Scope.TRAIN},
    ("POST", "/tasks/{task_id}/versions"): {Scope.UPLOAD},
    ("PUT", "/tasks/{task_id}/aliases/{alias}"): {Scope.ADMIN},
    ("POST", "/tasks/{task_id}/rollback"): {Scope.ADMIN},
    ("POST", "/tasks/{task_id}/restore"): {Scope.ADMIN},
    ("DELETE", "/tasks/{task_id}"): {Scope.ADMIN},
    ("GET", "/metrics"): {Scope.METRICS},
    ("GET", "/ops/stream"): {Scope.METRICS},
    **{("GET", path): set(Scope) for path in ("/health", "/info", "/version", "/openapi.json")},
    ("HEAD", "/openapi.json"): set(Scope),
}


class Keys:
    """A key file, and a server that reads it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        change_keys(path, lambda keys: [])
        self.ring = Keyring(path)

    def add(self, name: str, *scopes: Scope, **fields: Any) -> dict[str, str]:
        """The header that a client with such a key sends."""
        text = new_key_text()
        key = Key(name=name, sha256=hash_of(text), scopes=frozenset(scopes), **fields)
        change_keys(self.path, lambda keys: [*keys, key])
        return bearer(text)


def bearer(text: str) -> dict[str, str]:
    return {"authorization": f"Bearer {text}"}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys(tmp_path_factory.mktemp("keys") / "keys.json")


@pytest.fixture(scope="module")
def url(stack: Stack, keys: Keys) -> Iterator[str]:
    with serving(ServerState(services=services_of(stack)), keys=keys.ring) as address:
        yield address


@pytest.fixture(scope="module")
def everything(keys: Keys) -> dict[str, str]:
    return keys.add("everything", *Scope)


def routes() -> list[tuple[str, str]]:
    app = create_app(ServerState())
    return sorted(
        (method, route.path_format or route.path)
        for route in iter_route_contexts(app.routes)
        for method in (route.methods or {"GET"})
        if route.path is not None
    )


def filled(path: str) -> str:
    return path.replace("{task_id}", "some-task").replace("{alias}", "live").replace("{model}", "some-task")


@contextmanager
def admitted_key(keys: Keys, name: str, *scopes: Scope, **fields: Any) -> Iterator[dict[str, str]]:
    yield keys.add(name, *scopes, **fields)
    change_keys(keys.path, lambda all_: [key for key in all_ if key.name != name])


def test_every_route_is_in_the_table() -> None:
    assert set(routes()) - PUBLIC == set(NEEDED)


def test_every_route_but_the_public_ones_wants_a_key(client: httpx.Client) -> None:
    paths = {filled(path) for _, path in routes()}
    for method, path in itertools.product(METHODS, sorted(paths)):
        response = client.request(method, path)
        if (method, path) in PUBLIC:
            assert response.status_code == 200, (method, path)
            assert method == "HEAD" or response.json().keys() == {"status"}
            continue
        assert response.status_code == 401, (method, path, response.status_code)
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.headers["x-request-id"]
        if method != "HEAD":
            assert error_of(response, 401)["code"] == "unauthorized"


@pytest.mark.parametrize("scope", list(Scope))
def test_every_scope_opens_its_routes_and_no_other(client: httpx.Client, keys: Keys, scope: Scope) -> None:
    with admitted_key(keys, f"only-{scope}", scope) as headers:
        for (method, path), needed in NEEDED.items():
            with client.stream(method, filled(path), headers=headers) as response:  # one has no end
                if scope in needed:
                    assert response.status_code not in (401, 403, 405), (method, path, response.read())
                    continue
                response.read()
            message = error_of(response, 403)["message"]
            assert " or ".join(sorted(needed)) in message, (method, path)
            assert f"this one has {scope}" in message


@pytest.mark.parametrize(
    "target",
    [
        "//generate",
        "/generate/",
        "/Generate",
        "/GENERATE",
        "/%67enerate",
        "/generate%2f",
        "/generate?key=x",
        "/generate;x",
        "/./generate",
        "/health/live/../../generate",
        "/health/live/..%2f..%2fgenerate",
        "/health/live%2f..%2f..%2fgenerate",
        "/health/live/",
        "//health/live",
        "/health//live",
        "/HEALTH/LIVE",
        "/health/live%00",
        "/health/live%20",
        "/console/../generate",
        "/metrics/",
        "//metrics",
        "/tasks//",
        "/tasks/a/../../metrics",
        "/no-such-route",
        "http://localhost/generate",
        "http://localhost/health/live/../../metrics",
        "http://health/live",
        "*",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "OPTIONS"])
def test_there_is_no_way_around(url: str, method: str, target: str) -> None:
    body = json.dumps({"inputs": "a"})
    head = (
        f"{method} {target} HTTP/1.1\nHost: localhost\nContent-Type: application/json\n"
        f"Content-Length: {len(body)}\nConnection: close\n\n"
    )
    status = raw_exchange(url, head + body).split()[1]  # at once: what comes after the close is a reset
    assert status in (b"400", b"401"), (method, target, status)


@pytest.mark.parametrize(
    "headers",
    [
        "X-Forwarded-For: 127.0.0.1",
        "X-Original-URL: /health/live",
        "X-Rewrite-URL: /health/live",
        "X-HTTP-Method-Override: GET",
        "X-Forwarded-Prefix: /health/live",
    ],
)
def test_headers_of_proxies_open_nothing(url: str, headers: str) -> None:
    answer = raw_exchange(url, f"GET /metrics HTTP/1.1\nHost: localhost\n{headers}\n\n")
    assert answer.split()[1] == b"401"


def test_only_a_whole_key_in_its_header_counts(client: httpx.Client, everything: dict[str, str]) -> None:
    text = everything["authorization"].removeprefix("Bearer ")
    assert client.get("/version", headers=everything).status_code == 200
    assert client.get("/version", headers={"authorization": f"bearer  {text}"}).status_code == 200
    other = new_key_text()
    for value in (
        text,
        f"Token {text}",
        f"Bearer {text[:-1]}",
        f"Bearer {text}x",
        f"Bearer {text} {text}",
        f"Bearer {text.lower()}",
        f"Bearer {hash_of(text)}",
        f"Bearer {other}",
        "Bearer",
        "",
        "Basic " + base64.b64encode(f"user:{text}".encode()).decode(),
    ):
        error_of(client.get("/version", headers={"authorization": value}), 401)
    twice = [("authorization", f"Bearer {text}"), ("authorization", f"Bearer {text}")]
    assert client.get("/version", headers=twice).status_code == 401
    assert client.get("/version", params={"key": text, "access_token": text}).status_code == 401
    assert client.get("/version", headers={"cookie": f"authorization={text}"}).status_code == 401
    assert client.get("/version", headers={"x-api-key": text}).status_code == 200


def test_a_key_is_asked_for_before_the_body(url: str, client: httpx.Client, keys: Keys) -> None:
    head = "POST /generate HTTP/1.1\nHost: localhost\nContent-Type: application/json\n"
    for length in ("100", "999999999999"):
        answer = raw_exchange(url, f"{head}Content-Length: {length}\n\n")
        assert answer.split()[1] == b"401"
    with admitted_key(keys, "uploader", Scope.UPLOAD) as headers:
        authorization = f"Authorization: {headers['authorization']}\n"
        answer = raw_exchange(url, f"{head}{authorization}Content-Length: 100\n\n")
        assert answer.split()[1] == b"403"


def test_unknown_routes_and_methods_are_told_to_key_holders(
    client: httpx.Client, everything: dict[str, str]
) -> None:
    error_of(client.get("/no-such-route", headers=everything), 404)
    response = client.delete("/generate", headers=everything)
    error_of(response, 405)
    assert response.headers["allow"] == "POST"


def test_a_route_that_declares_nothing_is_closed(
    stack: Stack, keys: Keys, everything: dict[str, str]
) -> None:
    app = create_app(ServerState(services=services_of(stack)), keys=keys.ring)

    @app.get("/new")
    async def new() -> str:
        return "secret"

    transport = httpx.ASGITransport(app)

    async def ask(headers: dict[str, str]) -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as asking:
            return await asking.get("/new", headers=headers)

    error_of(asyncio.run(ask({})), 401)
    error_of(asyncio.run(ask(everything)), 403)
    contexts = [route for route in iter_route_contexts(app.routes) if route.path != "/new"]
    assert all(declared_access(route) is not None for route in contexts)


def test_a_removed_key_is_refused_at_once(client: httpx.Client, keys: Keys) -> None:
    with admitted_key(keys, "short-lived", Scope.GENERATE) as headers:
        assert client.get("/version", headers=headers).status_code == 200
    error_of(client.get("/version", headers=headers), 401)


def test_any_host_where_the_allow_list_is_open(stack: Stack, keys: Keys, everything: dict[str, str]) -> None:
    config = ApiConfig(allowed_hosts=None)
    with (
        serving(ServerState(services=services_of(stack)), config, keys.ring) as url,
        client_of(url) as client,
    ):
        host = {"host": "model.example"}
        assert client.get("/version", headers=everything | host).status_code == 200
        assert client.get("/version", headers=host).status_code == 401
        assert client.get("/health/live", headers=host).status_code == 200


def test_a_foreign_host_or_origin_is_refused_with_a_key_too(
    client: httpx.Client, everything: dict[str, str]
) -> None:
    assert client.get("/version", headers=everything | {"host": "evil.example"}).status_code == 403
    body = {"inputs": "a"}
    foreign = everything | {"origin": "http://evil.example"}
    assert client.post("/generate", json=body, headers=foreign).status_code == 403


# -- tasks ---------------------------------------------------------------------------------------


def publish(client: httpx.Client, headers: dict[str, str], task: str) -> httpx.Response:
    files = {"task": (None, json.dumps({"template": f"{task}: {{x}}"}))}
    return client.post(f"/tasks/{task}/versions", files=files, headers=headers)


@pytest.fixture(scope="module")
def two_tasks(url: str, everything: dict[str, str]) -> str:
    """team-a-one and team-b-one exist; the digest of the latter's version."""
    with client_of(url) as client:
        assert publish(client, everything, "team-a-one").status_code == 201
        digest: str = publish(client, everything, "team-b-one").json()["version_digest"]
    return digest


def test_a_key_reaches_its_tasks_only(client: httpx.Client, keys: Keys, two_tasks: str) -> None:
    short = {"max_new_tokens": 1}
    with admitted_key(keys, "team-a", Scope.GENERATE, tasks=("team-a-*",)) as headers:

        def ask(path: str, **body: Any) -> httpx.Response:
            return client.post(path, json=body, headers=headers)

        for good in ("team-a-one", "team-a-one@live", "team-a-one@1"):
            assert ask("/generate", task_id=good, inputs="a", parameters=short).status_code == 200
            assert ask("/v1/completions", model=good, prompt="a", max_tokens=1).status_code == 200
            assert ask("/tokenize", task_id=good, inputs="a").status_code == 200
            assert client.get(f"/v1/models/{good}", headers=headers).status_code == 200
        messages = [{"role": "user", "content": "a"}]
        exists, not_there = "team-b-one", "team-b-two"
        for suffix in ("", "@live", "@1", "@none-such", "@" + two_tasks):
            answers = []
            for task in (exists, not_there):
                name = task + suffix
                answers.append(
                    [
                        ask("/generate", task_id=name, inputs="a"),
                        ask("/", task_id=name, inputs="a"),
                        ask("/generate", inputs="a", parameters={"adapter_id": name}),
                        ask("/generate_stream", task_id=name, inputs="a"),
                        ask("/generate", task_id=name, inputs="a", parameters={"choices": True}),
                        ask("/v1/completions", model=name, prompt="a"),
                        ask("/v1/decisions", model=name, input="a", questions=[IS_IT]),
                        ask("/v1/completions", model=name, prompt=["a", "b"], stream=True),
                        ask("/v1/chat/completions", model=name, messages=messages),
                        ask("/v1/responses", model=name, input="a"),
                        ask("/v1/responses", model=name, input=messages, stream=True),
                        ask("/tokenize", task_id=name, inputs="a"),
                        client.get(f"/v1/models/{name}", headers=headers),
                        client.get(f"/tasks/{task}", headers=headers),
                    ]
                )
            for one, other in zip(*answers, strict=True):
                assert (
                    error_of(one, 403)["message"].replace(exists, not_there)
                    == error_of(other, 403)["message"]
                )
        for base in ({"inputs": "a"}, {"inputs": "a", "task_id": BASE_NAME}):
            assert "team-a-*" in error_of(ask("/generate", **base), 403)["message"]
            error_of(ask("/tokenize", **base), 403)
        error_of(ask("/v1/completions", model=BASE_NAME, prompt="a"), 403)


def test_the_base_is_granted_by_name(client: httpx.Client, keys: Keys, two_tasks: str) -> None:
    with admitted_key(keys, "base-only", Scope.GENERATE, tasks=(BASE_NAME,)) as headers:
        body = {"inputs": "a", "parameters": {"max_new_tokens": 1}}
        assert client.post("/generate", json=body, headers=headers).status_code == 200
        error_of(client.post("/generate", json=body | {"task_id": "team-a-one"}, headers=headers), 403)
        models = client.get("/v1/models", headers=headers).json()["data"]
        assert [model["id"] for model in models] == [BASE_NAME]


def test_listings_show_a_keys_own_tasks(client: httpx.Client, keys: Keys, two_tasks: str) -> None:
    with admitted_key(keys, "team-a", Scope.GENERATE, tasks=("team-a-*",)) as headers:
        listed = client.get("/tasks", headers=headers).json()
        assert [task["id"] for task in listed["tasks"]] == ["team-a-one"]
        page = client.get("/tasks", headers=headers, params={"limit": 1}).json()
        assert page["next"] is None  # nothing tells that others follow
        models = client.get("/v1/models", headers=headers)
        assert [model["id"] for model in models.json()["data"]] == ["team-a-one"]
        assert client.get("/health", headers=headers).json()["tasks"] == 1
        assert "team-b" not in listed["tasks"].__repr__() + models.text


def test_changes_are_bounded_by_the_tasks_of_a_key(client: httpx.Client, keys: Keys, two_tasks: str) -> None:
    scopes = (Scope.UPLOAD, Scope.ADMIN)
    with admitted_key(keys, "team-a", *scopes, tasks=("team-a-*",)) as headers:
        for task in ("team-b-one", "team-b-two", "team-c"):
            error_of(publish(client, headers, task), 403)
            error_of(client.put(f"/tasks/{task}/aliases/live", json={"version": 1}, headers=headers), 403)
            error_of(client.post(f"/tasks/{task}/rollback", headers=headers), 403)
            error_of(client.post(f"/tasks/{task}/restore", headers=headers), 403)
            error_of(client.delete(f"/tasks/{task}", headers=headers), 403)
        assert publish(client, headers, "team-a-two").status_code == 201


EXAMPLES = {"examples": [{"inputs": "the film", "expected": "no"}, {"inputs": "food", "expected": "no"}]}


def publish_examples(client: httpx.Client, headers: dict[str, str], task: str) -> httpx.Response:
    settings = {"template": f"{task}: {{x}}", "defaults": {"max_new_tokens": 9}} | EXAMPLES
    files = {"task": (None, json.dumps(settings))}
    return client.post(f"/tasks/{task}/versions", files=files, headers=headers)


def test_examples_are_answers_and_need_the_scope_for_them(
    client: httpx.Client, keys: Keys, stack: Stack
) -> None:
    before = stack.files()
    with admitted_key(keys, "blind", Scope.UPLOAD, Scope.ADMIN) as headers:
        stack.outcomes.clear()
        refused = error_of(publish_examples(client, headers, "peeping"), 403)
        assert "scope generate" in refused["message"]
        assert refused["code"] == "forbidden"
        assert (stack.files(), stack.outcomes) == (before, [])
        without = publish(client, headers, "peeping")
        assert (without.status_code, without.json()["examples"]) == (201, [])
        assert stack.outcomes == []  # the trial run tells nothing, and is free
    scopes = (Scope.UPLOAD, Scope.GENERATE)
    with admitted_key(keys, "team-a", *scopes, tasks=("team-a-*",)) as headers:
        error_of(publish_examples(client, headers, "team-b-examples"), 403)


def test_examples_count_against_the_quota(client: httpx.Client, keys: Keys, stack: Stack) -> None:
    scopes = (Scope.UPLOAD, Scope.GENERATE)
    with admitted_key(keys, "paying", *scopes, tokens_per_minute=20) as headers:
        stack.outcomes.clear()
        answer = publish_examples(client, headers, "paid")
        assert answer.status_code == 201
        assert {outcome.tenant for outcome in stack.outcomes} == {"paying"}
        assert len(stack.outcomes) == len(answer.json()["examples"]) == 2
        shown = client.get("/tasks/paid", headers=headers).json()
        assert shown["requests_served"] == 0  # nobody asked the task
        assert sum(outcome.generated_tokens for outcome in stack.outcomes) >= 2
        for outcome in stack.outcomes:
            keys.ring.charge(outcome.tenant, outcome.prompt_tokens + outcome.generated_tokens)
        assert error_of(publish_examples(client, headers, "paid-again"), 429)["code"] == "rate_limited"
        assert publish(client, headers, "paid-plain").status_code == 201  # nothing of it is answered


def test_who_did_it_is_on_record(client: httpx.Client, keys: Keys, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.INFO, "promptplex.audit"),
        admitted_key(keys, "ci", Scope.UPLOAD) as ci,
        admitted_key(keys, "ops", Scope.ADMIN) as ops,
    ):
        assert publish(client, ci, "recorded").status_code == 201
        moved = client.put("/tasks/recorded/aliases/canary", json={"version": 1}, headers=ops)
        assert moved.status_code == 200
        assert client.delete("/tasks/recorded", headers=ops).status_code == 200
        assert client.post("/tasks/recorded/restore", headers=ops).status_code == 200
        shown = client.get("/tasks/recorded", headers=ops).json()
    assert [release["who"] for release in shown["releases"]] == ["ci", "ops", "ops", "ops"]
    assert shown["versions"][0]["provenance"]["uploader"] == "ci"
    assert [record.getMessage() for record in caplog.records if record.name == "promptplex.audit"] == [
        "ci uploaded version 1: task recorded, release 1",
        "ops moved canary: task recorded, release 2",
        "ops retired: task recorded, release 3",
        "ops restored: task recorded, release 4",
    ]


def test_the_key_is_the_tenant(client: httpx.Client, keys: Keys, stack: Stack, two_tasks: str) -> None:
    body = {"inputs": "a", "parameters": {"max_new_tokens": 2}}
    with admitted_key(keys, "tenant-1", Scope.GENERATE) as headers:
        stack.outcomes.clear()
        for path, more in (
            ("/generate", {}),
            ("/generate", {"stream": True}),
            ("/generate", {"parameters": {"choices": ["a", "b"]}}),
            ("/v1/completions", {}),
            ("/v1/chat/completions", {}),
            ("/v1/responses", {}),
        ):
            sent: dict[str, Any] = body | more
            if path == "/v1/completions":
                sent = {"model": BASE_NAME, "prompt": "a", "max_tokens": 2, "n": 2}
            if path == "/v1/chat/completions":
                sent = {
                    "model": "team-a-one",
                    "messages": [{"role": "user", "content": "a"}],
                    "max_tokens": 2,
                }
            if path == "/v1/responses":
                sent = {"model": "team-a-one", "input": "a", "max_output_tokens": 2}
            assert client.post(path, json=sent, headers=headers).status_code == 200, path
    assert [outcome.tenant for outcome in stack.outcomes] == ["tenant-1"] * 7
    assert all(outcome.prompt_tokens + outcome.generated_tokens > 0 for outcome in stack.outcomes)


def test_a_key_sticks_to_one_version_of_a_weighted_alias(client: httpx.Client, keys: Keys) -> None:
    with admitted_key(keys, "sticky", *Scope) as headers:
        for number in (1, 2):
            files = {"task": (None, json.dumps({"template": f"{number}: {{x}}"}))}
            client.post("/tasks/weighted/versions", files=files, headers=headers)
        meant = {"weights": {"1": 50, "2": 50}}
        assert client.put("/tasks/weighted/aliases/live", json=meant, headers=headers).status_code == 200
        body = {"task_id": "weighted", "inputs": "a", "parameters": {"max_new_tokens": 1}}
        answers = [client.post("/generate", json=body, headers=headers).json() for _ in range(10)]
        assert len({answer["task_version"] for answer in answers}) == 1


# -- quotas --------------------------------------------------------------------------------------


def test_requests_over_the_quota_wait(client: httpx.Client, keys: Keys) -> None:
    with admitted_key(keys, "small", *Scope, requests_per_minute=2) as headers:
        assert client.get("/tasks", headers=headers).status_code == 200
        error_of(client.post("/generate", json={}, headers=headers), 422)  # counts: it reached its route
        for response in (
            client.get("/tasks", headers=headers),
            client.post("/generate", content=b"{", headers=headers),
            publish(client, headers, "late"),
        ):
            error = error_of(response, 429)
            assert (error["code"], error["type"]) == ("rate_limited", "rate_limit_error")
            assert "2 requests a minute" in error["message"]
            assert 1 <= int(response.headers["retry-after"]) <= 30
        for path in ("/metrics", "/health", "/version", "/info", "/openapi.json"):
            assert client.get(path, headers=headers).status_code == 200
        metrics = client.get("/metrics", headers=headers).text
    refused = [line for line in metrics.splitlines() if line.startswith("promptplex_request_refusals_total")]
    assert {line.split('"')[1] for line in refused} >= {"rate_limited", "unauthorized", "forbidden"}


def test_openai_waits_by_itself(url: str, keys: Keys) -> None:
    with admitted_key(keys, "retrying", Scope.GENERATE, tokens_per_minute=6000) as headers:
        text = headers["authorization"].removeprefix("Bearer ")
        client = openai.OpenAI(
            base_url=f"{url}/v1", api_key=text, max_retries=2, http_client=httpx.Client(trust_env=False)
        )

        def ask(asking: openai.OpenAI) -> str:
            return asking.completions.create(model=BASE_NAME, prompt="a", max_tokens=1).object

        with client:
            assert ask(client) == "text_completion"
            keys.ring.charge("retrying", 6050)  # half a second of debt
            with pytest.raises(openai.RateLimitError) as caught:
                ask(client.with_options(max_retries=0))
            assert caught.value.code == "rate_limited"
            keys.ring.charge("retrying", 50)
            began = time.monotonic()
            assert ask(client) == "text_completion"
            assert time.monotonic() - began >= 0.5  # it has waited as it was told


def test_openai_tells_a_wrong_key_and_a_wrong_scope(url: str, keys: Keys) -> None:
    http = httpx.Client(trust_env=False)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", http_client=http) as client:
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
        with admitted_key(keys, "scraper", Scope.METRICS) as headers:
            text = headers["authorization"].removeprefix("Bearer ")
            with pytest.raises(openai.PermissionDeniedError, match="generate"):
                client.with_options(api_key=text).completions.create(model=BASE_NAME, prompt="a")


# -- the document --------------------------------------------------------------------------------


def test_the_document_tells_of_keys(client: httpx.Client, everything: dict[str, str], stack: Stack) -> None:
    document = client.get("/openapi.json", headers=everything).json()
    assert document["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            place = (method.upper(), path)
            if place in PUBLIC:
                assert operation["security"] == []
                assert "401" not in operation["responses"]
                continue
            assert operation["security"] == [{"bearer": []}]
            assert operation["responses"].keys() >= {"401", "403"}
            counted = not NEEDED[place] & {Scope.METRICS}
            assert ("429" in operation["responses"]) == counted, place
    bare = create_app(ServerState(services=services_of(stack))).openapi()
    assert "securitySchemes" not in bare["components"]


def test_a_server_that_loads_asks_for_keys_too(keys: Keys, everything: dict[str, str]) -> None:
    with serving(ServerState(), keys=keys.ring) as url, client_of(url) as client:
        assert client.get("/health/live").json() == {"status": "alive"}
        assert client.get("/health/ready").json() == {"status": "loading"}
        assert client.get("/health").status_code == 401
        assert client.post("/generate", json={"inputs": "a"}).status_code == 401
        assert client.post("/generate", json={"inputs": "a"}, headers=everything).status_code == 503
