import json
import time
from collections.abc import Iterator

import httpx
import pytest

from app.api.middleware.headers import complete_headers
from app.api.state import ApiConfig, ServerState
from app.prompt import LayerGeometry
from tests.api.server import CONTINUE, client_of, raw_exchange, services_of, serving
from tests.api.test_generate import error_of
from tests.serving.stack import Stack
from tests.store.builders import geometry
from tests.waiting import PATIENCE


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:8000", 200),
        ("LocalHost:1", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("evil.example:8000", 403),
        ("localhost@evil.example", 403),
        ("localhost/x", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost:x", 403),
        ("", 403),
    ],
)
def test_only_loopback_names_are_hosts(client: httpx.Client, host: str, status: int) -> None:
    response = client.get("/version", headers={"host": host})
    assert response.status_code == status, response.text
    if status == 403:
        message = error_of(response, 403)["message"]
        assert "Host" in message
        assert "--allowed-hosts" in message


def test_a_host_is_named_once(url: str) -> None:
    for hosts in ("Host: localhost\nHost: evil.example\n", ""):
        answer = raw_exchange(url, f"GET /version HTTP/1.0\n{hosts}\n")
        assert answer.split()[1] in (b"400", b"403")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"origin": "{own}"}, 200),
        ({"origin": "{own}", "sec-fetch-site": "same-origin"}, 200),
        ({"sec-fetch-site": "none"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1:1"}, 403),
        ({"origin": "https://allowed.example"}, 200),
        ({"origin": "http://allowed.example"}, 403),
        ({"origin": "https://allowed.example", "sec-fetch-site": "cross-site"}, 200),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"origin": "{own}", "sec-fetch-site": "cross-site"}, 403),
        ({"origin": ""}, 403),
    ],
)
def test_pages_of_other_sites_are_refused(stack: Stack, headers: dict[str, str], status: int) -> None:
    config = ApiConfig(allowed_origins=("https://allowed.example",))
    with serving(ServerState(services=services_of(stack)), config) as url, client_of(url) as client:
        sent = {name: value.replace("{own}", url) for name, value in headers.items()}
        body = {"inputs": "a", "parameters": {"max_new_tokens": 1}}
        response = client.post("/generate", json=body, headers=sent)
        assert response.status_code == status, response.text
        assert client.get("/version", headers=sent).status_code == 200
        if status == 403 and sent.get("sec-fetch-site") is None:
            assert "--allowed-origins" in error_of(response, 403)["message"]


def test_an_open_allow_list(stack: Stack) -> None:
    config = ApiConfig(allowed_hosts=None)
    with serving(ServerState(services=services_of(stack)), config) as url, client_of(url) as client:
        assert client.get("/version", headers={"host": "model.example"}).status_code == 200


SMALL = ApiConfig(max_body_bytes=1000, max_upload_bytes=5000)


def test_bodies_are_capped_by_their_declared_length(stack: Stack) -> None:
    with serving(ServerState(services=services_of(stack)), SMALL) as url, client_of(url) as client:
        assert client.post("/generate", json={"inputs": "a" * 700}).status_code == 422
        response = client.post("/generate", json={"inputs": "a" * 1000})
        message = error_of(response, 413)["message"]
        assert "1000 bytes" in message
        assert "--max-body-bytes" in message
        upload = client.post("/tasks/big/versions", files={"prompt": b"x" * 6000})
        message = error_of(upload, 413)["message"]
        assert "5000 bytes" in message
        assert "--max-upload-bytes" in message
        assert "prefix of 256 tokens" in message
        assert "save_embedding_layers=False" in message
        assert client.get("/info").json()["max_upload_bytes"] == 5000
        assert response.headers["x-request-id"]
        answer = raw_exchange(
            url, "POST /generate HTTP/1.1\nHost: localhost\nContent-Length: 999999999999\n\n"
        )
        assert b"413" in answer.split(b"\r\n")[0]


def test_an_upload_has_room_for_a_long_prefix_of_the_base(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = ServerState(services=services_of(stack))
    assert ServerState().max_upload_bytes(None) == state.max_upload_bytes(None) == 64 << 20
    llama_2_7b = (LayerGeometry(32, 128, 128),) * 32
    monkeypatch.setattr(stack.engine.backbone, "geometry", geometry(decoder=llama_2_7b, max_positions=4096))
    two_hundred_tokens = 200 * 2 * 32 * 32 * 128 * 4
    assert two_hundred_tokens + (2 << 20) < state.max_upload_bytes(None) < 300 << 20
    assert state.max_upload_bytes(1000) == 1000
    with serving(state) as url, client_of(url) as client:
        assert client.get("/info").json()["max_upload_bytes"] == state.max_upload_bytes(None)
        declared = f"Content-Length: {two_hundred_tokens + (1 << 20)}"
        head = f"POST /tasks/big/versions HTTP/1.1\nHost: localhost\nContent-Type: text/plain\n{declared}\n\n"
        assert b"415" in raw_exchange(url, head).split(b"\r\n")[0]
    monkeypatch.setattr(stack.engine.backbone, "geometry", geometry(decoder=llama_2_7b, max_positions=20))
    assert state.max_upload_bytes(None) == 64 << 20


@pytest.mark.parametrize(
    "place", ["PUT /tasks/big/versions", "POST /tasks/a/b/versions", "POST /tasks/big/versions/"]
)
def test_only_uploads_have_the_limit_of_uploads(stack: Stack, place: str) -> None:
    method, path = place.split()
    with serving(ServerState(services=services_of(stack)), SMALL) as url, client_of(url) as client:
        answer = client.request(method, path, content=b"x" * 2000)
        assert "--max-body-bytes" in error_of(answer, 413)["message"]


def chunks(size: int, count: int) -> list[bytes]:
    return [b"%x\r\n%s\r\n" % (size, b"x" * size)] * count + [b"0\r\n\r\n"]


@pytest.mark.parametrize("path", ["/generate", "/tasks/big/versions", "/tasks/a/rollback"])
def test_bodies_are_capped_while_they_stream(stack: Stack, path: str) -> None:
    before = stack.files()
    with serving(ServerState(services=services_of(stack)), SMALL) as url:
        kind = "multipart/form-data; boundary=b" if "versions" in path else "application/json"
        head = f"POST {path} HTTP/1.1\nHost: localhost\nContent-Type: {kind}\nTransfer-Encoding: chunked\n\n"
        part = b'--b\r\nContent-Disposition: form-data; name="prompt"; filename="p"\r\n\r\n'
        start = [b"%x\r\n%s\r\n" % (len(part), part)] if "versions" in path else []
        answer = raw_exchange(url, head, *start, *chunks(1000, 20))
        assert b"413" in answer.split(b"\r\n")[0]
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "payload_too_large"
        assert b"x-request-id" in answer
    assert stack.files() == before


def test_an_endless_body_is_cut(stack: Stack) -> None:
    with serving(ServerState(services=services_of(stack)), SMALL) as url:
        head = "POST /generate HTTP/1.1\nHost: localhost\nContent-Type: application/json\n"
        # It never ends its body; the server answers at once and doesn't wait for the rest.
        answer = raw_exchange(url, head + "Transfer-Encoding: chunked\n\n", *chunks(2000, 2)[:-1])
        assert b"413" in answer.split(b"\r\n")[0]


@pytest.mark.parametrize(
    "body",
    [
        ("Content-Length: 500\n\n", b"--b"),
        ("Transfer-Encoding: chunked\n\n", b"5\r\n--b"),
        ("Content-Length: 500\nExpect: 100-continue\n\n", b""),
    ],
)
@pytest.mark.parametrize("path", ["/generate", "/tasks/slow/versions"])
def test_a_body_that_does_not_come_is_cut(stack: Stack, path: str, body: tuple[str, bytes]) -> None:
    before = stack.files()
    with serving(ServerState(services=services_of(stack)), ApiConfig(body_seconds=0.3)) as url:
        kind = "multipart/form-data; boundary=b" if "versions" in path else "application/json"
        answer = raw_exchange(
            url, f"POST {path} HTTP/1.1\nHost: localhost\nContent-Type: {kind}\n{body[0]}", body[1]
        )
        answer = answer.removeprefix(CONTINUE)
        assert answer.startswith(b"HTTP/1.1 408"), answer
        assert b'"code":"request_timeout"' in answer
        assert b"connection: close" in answer
        assert b"x-request-id" in answer
    assert stack.files() == before


def test_a_body_that_comes_slowly_but_surely_is_taken(stack: Stack) -> None:
    """It takes longer than `body_seconds`, but each part of it wins time."""
    config = ApiConfig(body_seconds=3.0)
    with (
        serving(ServerState(services=services_of(stack)), config) as url,
        httpx.Client(base_url=url, timeout=PATIENCE, trust_env=False) as client,
    ):

        def parts() -> Iterator[bytes]:
            yield b'{"inputs": "a", "parameters": {"max_new_tokens": 1}' + b" " * 200_000
            for _ in range(8):
                time.sleep(0.5)
                yield b" " * 4096
            yield b"}"

        headers = {"content-type": "application/json"}
        assert client.post("/generate", content=parts(), headers=headers).status_code == 200


def test_generating_takes_as_long_as_it_takes(stack: Stack) -> None:
    """Once the body is there, no deadline of the edge runs, however long the client only waits."""
    config = ApiConfig(body_seconds=0.05, head_seconds=0.05, stall_seconds=0.05)
    body = {"inputs": stack.talkative(), "parameters": {"max_new_tokens": 150}}
    with serving(ServerState(services=services_of(stack)), config) as url, client_of(url) as client:
        assert client.post("/generate", json=body).status_code == 200


def test_every_answer_carries_the_security_headers(stack: Stack, client: httpx.Client) -> None:
    expected = {
        "x-content-type-options": "nosniff",
        "cache-control": "no-store",
        "referrer-policy": "no-referrer",
        "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
        "x-frame-options": "DENY",
    }
    answers = [
        client.get("/version"),
        client.get("/openapi.json"),
        client.get("/metrics"),
        client.get("/nothing"),
        client.delete("/version"),
        client.post("/generate", json={"inputs": 1}),
        client.post("/generate", json={"inputs": "a", "parameters": {"max_new_tokens": 1}}),
        client.post("/generate_stream", json={"inputs": "a", "parameters": {"max_new_tokens": 1}}),
        client.post("/generate", content=b"x" * (5 << 20)),
        client.get("/version", headers={"host": "evil.example"}),
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 404, 405, 422, 200, 200, 413, 403]
    for answer in answers:
        assert expected.items() <= answer.headers.items()
        assert answer.headers["x-request-id"]
        assert "server" not in answer.headers


def test_a_page_keeps_its_own_policy() -> None:
    own = [(b"content-security-policy", b"default-src 'self'"), (b"cache-control", b"max-age=60")]
    completed = complete_headers(own, "id")
    assert completed[:2] == own
    names = [name for name, _ in completed]
    assert len(set(names)) == len(names)


def test_docs_pages_are_off(client: httpx.Client) -> None:
    assert [client.get(path).status_code for path in ("/docs", "/redoc", "/openapi.json")] == [404, 404, 200]


PREFLIGHT = {
    "origin": "https://allowed.example",
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type",
}


def cors_headers(response: httpx.Response) -> dict[str, str]:
    return {name: value for name, value in response.headers.items() if name.startswith("access-control")}


def test_without_allowed_origins_there_is_no_cors(client: httpx.Client) -> None:
    for response in (
        client.options("/generate", headers=PREFLIGHT),
        client.get("/version", headers={"origin": "https://allowed.example"}),
    ):
        assert not cors_headers(response)


def test_pages_of_named_origins_may_call(stack: Stack) -> None:
    config = ApiConfig(allowed_origins=("https://allowed.example",), max_body_bytes=1000)
    with serving(ServerState(services=services_of(stack)), config) as url, client_of(url) as client:
        preflight = client.options("/generate", headers=PREFLIGHT)
        assert preflight.status_code == 200
        assert preflight.headers["x-request-id"]
        found = cors_headers(preflight)
        assert found["access-control-allow-origin"] == "https://allowed.example"
        assert "POST" in found["access-control-allow-methods"]
        assert "authorization" in found["access-control-allow-headers"].lower()
        assert "access-control-allow-credentials" not in found

        asked = "authorization,x-stainless-lang,x-stainless-retry-count"
        openai = client.options("/generate", headers=PREFLIGHT | {"access-control-request-headers": asked})
        assert openai.status_code == 200
        assert cors_headers(openai)["access-control-allow-headers"] == asked

        cross = {"origin": "https://allowed.example", "sec-fetch-site": "cross-site"}
        body = {"inputs": "a", "parameters": {"max_new_tokens": 1}}
        for answer, status in (
            (client.post("/generate", json=body, headers=cross), 200),
            (client.post("/generate", json={"inputs": 1}, headers=cross), 422),
            (client.post("/generate", json={"inputs": "a" * 2000}, headers=cross), 413),
        ):
            assert answer.status_code == status
            assert answer.headers["access-control-allow-origin"] == "https://allowed.example"
            assert answer.headers["vary"] == "Origin"
            exposed = answer.headers["access-control-expose-headers"].lower()
            assert "x-request-id" in exposed
            assert "x-total-time" in exposed

        other = {"origin": "https://evil.example"}
        assert client.options("/generate", headers=PREFLIGHT | other).status_code == 400
        for answer in (
            client.options("/generate", headers=PREFLIGHT | other),
            client.get("/version", headers=other),
            client.post("/generate", json=body, headers=other),
        ):
            assert "access-control-allow-origin" not in answer.headers


def test_an_unexpected_error_says_nothing_of_its_cause(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: object) -> None:
        raise RuntimeError("secret /etc/passwd")

    monkeypatch.setattr(stack.generation, "generate_all", broken)
    with serving(ServerState(services=services_of(stack))) as url, client_of(url) as client:
        response = client.post("/generate", json={"inputs": "a"}, headers={"x-request-id": "find-me"})
        assert error_of(response, 500)["code"] == "internal"
        assert "secret" not in response.text
        assert response.headers["x-request-id"] == "find-me"
