"""What clients expect of a server beside its routes: HEAD, old HTTP, hints, one meaning of a query."""

import json
from pathlib import Path

import httpx
import pytest

from app.api.state import ServerState
from app.keys.key import Scope
from tests.api.server import client_of, raw_exchange, services_of, serving
from tests.api.test_generate import error_of
from tests.api.test_keys import Keys
from tests.server.test_connections import connect, read_all
from tests.serving.stack import Stack

GETS = ["/health", "/health/live", "/health/ready", "/info", "/version", "/metrics", "/tasks", "/v1/models"]


@pytest.mark.parametrize("path", [*GETS, "/openapi.json", "/tasks/nobody", "/nothing"])
def test_head_is_get_without_its_body(client: httpx.Client, path: str) -> None:
    got, head = client.get(path), client.head(path)
    assert (head.status_code, head.content) == (got.status_code, b"")
    assert head.headers["content-type"] == got.headers["content-type"]
    assert "content-length" in head.headers
    assert client.head("/generate").status_code == 405


def test_head_of_a_stream_ends_with_its_head(client: httpx.Client, url: str) -> None:
    head = "HEAD /ops/stream HTTP/1.1\nHost: localhost\n\n"
    answer = raw_exchange(url, head + "GET /version HTTP/1.1\nHost: localhost\nConnection: close\n\n")
    first, _, second = answer.partition(b"\r\n\r\n")
    assert b"text/event-stream" in first
    assert second.startswith(b"HTTP/1.1 200"), "the connection goes on"
    with client.stream("GET", "/ops/stream") as stream:
        assert stream.status_code == 200


def test_head_asks_for_the_key_that_get_asks_for(stack: Stack, tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys.json")
    generate = keys.add("generate", Scope.GENERATE)
    with serving(ServerState(services=services_of(stack)), keys=keys.ring) as url, client_of(url) as client:
        assert client.head("/metrics").status_code == 401
        assert client.head("/metrics", headers=generate).status_code == 403
        assert client.head("/tasks", headers=generate).status_code == 200


def test_a_key_by_another_header(stack: Stack, tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys.json")
    bearer, other = keys.add("one", *Scope), keys.add("two", *Scope)
    text = bearer["authorization"].removeprefix("Bearer ")
    given = {"x-api-key": text}
    with serving(ServerState(services=services_of(stack)), keys=keys.ring) as url, client_of(url) as client:
        assert client.get("/version", headers=given).status_code == 200
        assert client.get("/version", headers=given | bearer).status_code == 200
        assert client.get("/version", headers=given | other).status_code == 401
        assert client.get("/version", headers={"x-api-key": "ppx_no"}).status_code == 401
        assert client.get("/version", headers=given | {"authorization": "Basic eA=="}).status_code == 401


def test_a_key_for_some_tasks_is_shown_no_counts_of_others(stack: Stack, tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys.json")
    bound, free = keys.add("bound", Scope.GENERATE, tasks=("a",)), keys.add("free", Scope.GENERATE)
    with serving(ServerState(services=services_of(stack)), keys=keys.ring) as url, client_of(url) as client:
        assert {"queue", "prompt_cache"} <= client.get("/health", headers=free).json().keys()
        assert not {"queue", "prompt_cache"} & client.get("/health", headers=bound).json().keys()
        assert client.get("/health", headers=bound).json()["tasks"] == 0


KEPT = b"GET /version HTTP/1.0\r\nHost: localhost\r\nConnection: keep-alive\r\n\r\n"


def test_http_1_0_keeps_its_connection_where_it_asks(url: str) -> None:
    with connect(url) as connection:
        for _ in range(3):
            connection.sendall(KEPT)
            answer = b""
            while not answer.endswith(b"}"):
                more = connection.recv(65536)
                assert more
                answer += more
            assert b"connection: keep-alive" in answer
            assert b"transfer-encoding" not in answer
        connection.sendall(KEPT.replace(b"Connection: keep-alive\r\n", b""))
        assert b"connection: close" in read_all(connection)


@pytest.mark.parametrize("line", [b"", b"Connection: keep-alive\r\n"])
def test_http_1_0_knows_no_chunks(url: str, line: bytes) -> None:
    body = json.dumps({"inputs": "a", "parameters": {"max_new_tokens": 3}}).encode()
    head = b"POST /generate_stream HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\n%s" % line
    with connect(url) as connection:
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        head, _, events = read_all(connection).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head
    assert b"connection: close" in head
    assert [line[:5] for line in events.splitlines() if line] == [b"data:"] * 3
    assert json.loads(events.split(b"data:")[-1])["generated_text"]


def test_a_query_parameter_has_one_value(client: httpx.Client) -> None:
    for path in ("/tasks?limit=1&limit=2", "/tasks?limit=1&limit=1", "/tasks?after=a&after="):
        assert "twice" in error_of(client.get(path), 422)["message"]
    again = client.post("/tasks/a/versions?alias=live&alias=none", files={"task": b"{}"})
    assert error_of(again, 422)["param"] == "alias"


@pytest.mark.parametrize(
    "host", ["local\thost", "localhost\t:80", "local host", "localhost\x7f", "localh\xf6st"]
)
def test_a_host_with_a_tab_is_no_host(url: str, host: str) -> None:
    head = f"GET /version HTTP/1.1\nHost: {host}\nConnection: close\n\n"
    assert raw_exchange(url, head).split()[1] == b"400"


def test_an_origin_with_a_tab_is_foreign(url: str) -> None:
    head = "POST /generate HTTP/1.1\nHost: localhost\nOrigin: http://local\thost\nContent-Length: 0\n\n"
    assert raw_exchange(url, head).split()[1] == b"403"


@pytest.mark.parametrize("base", ["", "/v1/v1", "/v1/v1/v1"])
@pytest.mark.parametrize("path", ["/chat/completions", "/completions", "/models", "/responses"])
def test_a_base_url_that_is_not_ours_gets_a_hint(client: httpx.Client, base: str, path: str) -> None:
    method = "GET" if path == "/models" else "POST"
    message = error_of(client.request(method, base + path), 404)["message"]
    assert f"it is /v1{path}" in message
    assert "ends with /v1" in message


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/generate", {"POST"}),
        ("PUT", "/generate", {"POST"}),
        ("POST", "/version", {"GET", "HEAD"}),
        ("PATCH", "/tasks/a", {"GET", "HEAD", "DELETE"}),
        ("GET", "/v1/chat/completions", {"POST"}),
    ],
)
def test_405_says_what_is_allowed(client: httpx.Client, method: str, path: str, allowed: set[str]) -> None:
    answer = client.request(method, path)
    error_of(answer, 405)
    assert {name.strip() for name in answer.headers["allow"].split(",")} == allowed
