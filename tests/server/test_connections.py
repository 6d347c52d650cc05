"""Connections within bounds: heads, numbers, readers. Each refusal is an answer like any other."""

import asyncio
import json
import resource
import select
import socket
import time
from dataclasses import replace
from urllib.parse import urlsplit

import psutil
import pytest
from starlette.types import Receive, Scope, Send

from app.api.state import ApiConfig, ServerState
from app.server.connection_limits import raise_open_files
from tests.api.server import client_of, raw_exchange, serving, serving_app
from tests.waiting import PATIENCE, wait_until

SHORT = ApiConfig(head_seconds=0.4, body_seconds=0.5, stall_seconds=0.5)
PATIENT = ApiConfig()
GET = b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n"


def connect(url: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", urlsplit(url).port or 0), timeout=PATIENCE)


def read_all(connection: socket.socket) -> bytes:
    """Until the server closes."""
    answer = b""
    while more := connection.recv(65536):
        answer += more
    return answer


def read_version(connection: socket.socket) -> None:
    """The answer to `GET`, all of it."""
    answer = b""
    while not answer.endswith(b"}"):
        received = connection.recv(65536)
        assert received
        answer += received
    assert answer.startswith(b"HTTP/1.1 200")


def code_of(answer: bytes) -> tuple[int, str]:
    """Status and error code; checks what every answer carries."""
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    names = {line.split(b":")[0] for line in lines[1:]}
    assert {b"x-request-id", b"x-content-type-options", b"content-security-policy", b"cache-control"} <= names
    assert b"server" not in names
    return int(lines[0].split()[1]), json.loads(body)["error"]["code"]


@pytest.mark.parametrize(
    "pieces", [[b"GET"], [b"GET /version HTTP/1.1\r\nHost: localhost\r\nX: "], [b"\r\n"]]
)
def test_a_head_that_does_not_come_is_cut(pieces: list[bytes]) -> None:
    with serving(ServerState(), SHORT) as url, connect(url) as connection:
        for piece in pieces:
            connection.sendall(piece)
        assert code_of(read_all(connection)) == (408, "request_timeout")


def dribble(connection: socket.socket) -> bytes:
    """Send a byte now and then; what is answered until the server closes."""
    answer = b""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        try:
            connection.sendall(b"a")
            if select.select([connection], [], [], 0.02)[0]:
                received = connection.recv(65536)
                answer += received
                if not received:
                    return answer
        except ConnectionError:
            return answer
    raise AssertionError("it may dribble for ever")


def test_dribbling_bytes_win_no_time() -> None:
    with serving(ServerState(), SHORT) as url, connect(url) as connection:
        connection.sendall(b"GET /version HTTP/1.1\r\nHost: localhost\r\nX: ")
        assert code_of(dribble(connection)) == (408, "request_timeout")


def test_a_connection_that_says_nothing_is_closed() -> None:
    with serving(ServerState(), SHORT) as url, connect(url) as connection:
        assert read_all(connection) == b""


def test_later_requests_of_a_connection_have_the_clock_too() -> None:
    with serving(ServerState(), SHORT) as url, connect(url) as connection:
        connection.sendall(GET)
        read_version(connection)
        connection.sendall(GET[:10])
        assert code_of(read_all(connection)) == (408, "request_timeout")


def test_an_answered_request_that_never_ends_its_body_is_closed() -> None:
    with serving(ServerState(), SHORT) as url, connect(url) as connection:
        connection.sendall(b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nab")
        assert dribble(connection).startswith(b"HTTP/1.1 404")


def test_requests_one_after_the_other_and_all_at_once_are_answered() -> None:
    with serving(ServerState(), SHORT) as url, connect(url) as connection:
        connection.sendall(GET * 20)
        answers = b""
        while answers.count(b"HTTP/1.1 200") < 20:
            answers += connection.recv(65536)
        with client_of(url) as client:
            assert [client.get("/version").status_code for _ in range(20)] == [200] * 20


@pytest.mark.parametrize(
    "head",
    [
        f"GET /version?{'a' * 70_000} HTTP/1.1\nHost: localhost\n\n",
        f"GET /version HTTP/1.1\nHost: localhost\nX: {'a' * 70_000}\n\n",
        f"GET /version HTTP/1.1\nHost: localhost\nX: {'a' * 500_000}",  # never ends
        "GET /version HTTP/1.1\nHost: localhost\n" + "X: a\n" * 200 + "\n",
        f"GET /{'a' * 500_000}",
    ],
)
def test_heads_are_bounded(head: str) -> None:
    with serving(ServerState(), PATIENT) as url:
        assert code_of(raw_exchange(url, head)) == (431, "headers_too_large")


@pytest.mark.parametrize(
    "head",
    [
        "nonsense\n\n",
        "GET /version HTTP/9.9\nHost: localhost\n\n",
        "GET /\x00 HTTP/1.1\nHost: localhost\n\n",
        "POST /generate HTTP/1.1\nHost: localhost\nContent-Length: 3\nTransfer-Encoding: chunked\n\n",
        "POST /generate HTTP/1.1\nHost: localhost\nContent-Length: 3\nContent-Length: 4\n\n",
        "GET http://[ HTTP/1.1\nHost: localhost\n\n",
    ],
)
def test_what_is_no_http_gets_the_envelope(head: str) -> None:
    with serving(ServerState(), PATIENT) as url:
        assert code_of(raw_exchange(url, head)) == (400, "malformed_request")


@pytest.mark.parametrize("upgrade", ["websocket", "h2c"])
def test_there_are_no_other_protocols(upgrade: str) -> None:
    with serving(ServerState(), SHORT) as url, connect(url) as connection:
        head = (
            f"GET /version HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade\r\nUpgrade: {upgrade}\r\n\r\n"
        )
        for sent in (head.encode(), GET):  # answered as if it had not been asked for
            connection.sendall(sent)
            read_version(connection)
        connection.sendall(b"\x88\x80\x00\x00\x00\x00")  # a WebSocket's close
        assert code_of(read_all(connection)) == (400, "malformed_request")


def test_connections_are_bounded() -> None:
    few = replace(PATIENT, max_connections=3)
    with serving(ServerState(), few) as url:
        held = [connect(url) for _ in range(3)]
        for connection in held:  # answered, so it is there
            connection.sendall(GET)
            read_version(connection)
        with connect(url) as fourth:
            answer = read_all(fourth)
        assert code_of(answer) == (503, "overloaded")
        assert b"retry-after: 1" in answer
        for connection in held:
            connection.close()
        again = GET.decode().replace("\r", "")
        wait_until(lambda: raw_exchange(url, again).startswith(b"HTTP/1.1 200"))


class Endless:
    """Answers without end; notes how that ended."""

    def __init__(self) -> None:
        self.ended: str | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})

        async def write() -> None:
            while True:
                await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})

        writing = asyncio.ensure_future(write())
        self.ended = (await receive())["type"]
        writing.cancel()


def test_a_client_that_reads_nothing_is_let_go() -> None:
    app = Endless()
    with serving_app(app, SHORT) as url, connect(url) as connection:
        connection.sendall(GET)
        wait_until(lambda: app.ended is not None)
        assert app.ended == "http.disconnect"
        assert read_all(connection)  # what the kernel had taken; then it ends


def test_a_client_that_reads_slowly_is_not() -> None:
    app, slow = Endless(), replace(PATIENT, stall_seconds=2.0)
    with serving_app(app, slow) as url, connect(url) as connection:
        connection.sendall(GET)
        until = time.monotonic() + 2.5 * slow.stall_seconds
        while time.monotonic() < until:
            assert connection.recv(200_000)
            time.sleep(0.01)
        assert app.ended is None


def test_an_answer_that_nobody_takes_holds_no_connection() -> None:
    """It is complete, so only the connection waits."""

    async def large(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"connection", b"close")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"x" * (64 << 20)})

    with serving_app(large, SHORT) as url, connect(url) as connection:
        connection.sendall(GET)
        here = connection.getsockname()[1]
        wait_until(lambda: here in ports_held_by_the_server(url))
        wait_until(lambda: here not in ports_held_by_the_server(url), "the connection is still held")
        assert len(read_all(connection)) < 64 << 20


def ports_held_by_the_server(url: str) -> set[int]:
    """Ports of the clients whose connections the server, in this process, has open."""
    connections = psutil.Process().net_connections("tcp")
    return {each.raddr.port for each in connections if each.raddr and each.laddr.port == urlsplit(url).port}


def test_the_bound_of_open_files_is_raised() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(before[0], 512), before[1]))
        found = raise_open_files()
        assert found == resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 512
        assert raise_open_files() == found
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
