"""Requests that come before the last answer: few wait, and no client leaves unnoticed."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from starlette.types import Receive, Scope, Send

from app.api.state import ApiConfig, ServerState
from tests.api.server import client_of, raw_exchange, serving, serving_app
from tests.server.test_connections import GET, code_of, connect, read_all
from tests.waiting import PATIENCE, wait_until

CHUNKED = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"


class Gated:
    """Takes bodies, and answers when the gate opens; notes what came and how it ended."""

    def __init__(self) -> None:
        self.begun: list[Scope] = []
        self.ends: list[str] = []
        self._gate = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def open(self) -> None:
        """From any thread."""
        if self._loop is None:
            self._gate.set()
        else:
            self._loop.call_soon_threadsafe(self._gate.set)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._loop = asyncio.get_running_loop()
        self.begun.append(scope)
        self.ends.append(await self._end(receive))
        if self.ends[-1] == "answered":
            headers = [(b"content-length", b"3")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"yes"})

    async def _end(self, receive: Receive) -> str:
        while (message := await receive()).get("more_body", False):
            pass
        if message["type"] == "http.disconnect":
            return "left"
        waits = [asyncio.ensure_future(each) for each in (receive(), self._gate.wait())]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        return "answered" if self._gate.is_set() else "left"


@contextmanager
def gated() -> Iterator[tuple[Gated, socket.socket]]:
    """An app that has begun one request, and the connection that it came on."""
    app = Gated()
    with serving_app(app, ApiConfig()) as url, connect(url) as connection:
        connection.sendall(GET)
        wait_until(lambda: app.begun)
        yield app, connection
        app.open()


def wait_until_read(connection: socket.socket) -> None:
    """Until the server's loop has read what was sent: it has since answered others, one after the other."""
    url = f"http://127.0.0.1:{connection.getpeername()[1]}"
    for _ in range(3):
        assert raw_exchange(url, "nonsense\n\n").startswith(b"HTTP/1.1 400")


def answers(connection: socket.socket, count: int) -> bytes:
    """So many good answers, which must come first; what follows them until the server closes."""
    rest = read_all(connection)
    for _ in range(count):
        assert rest.startswith(b"HTTP/1.1 200")
        _, _, rest = rest.partition(b"yes")
    return rest


@pytest.mark.parametrize("behind", [GET, GET * 5, CHUNKED, CHUNKED + b"3\r\nabc\r\n"])
def test_a_client_that_leaves_is_noticed_whatever_waits_behind(behind: bytes) -> None:
    with gated() as (app, connection):
        connection.sendall(behind)
        wait_until_read(connection)  # so that the end comes by itself
        connection.close()
        wait_until(lambda: app.ends)
        assert app.ends == ["left"]
        assert len(app.begun) == 1


def test_few_requests_wait_and_all_of_them_are_answered() -> None:
    with gated() as (app, connection):
        connection.sendall(GET * 5000)
        wait_until_read(connection)
        app.open()
        assert code_of(answers(connection, 33)) == (400, "too_many_requests_at_once")
        assert len(app.begun) == 33


@pytest.mark.parametrize("size", [70_000, 5_000_000])
def test_a_large_request_does_not_wait(size: int) -> None:
    large = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % size
    with gated() as (app, connection):
        connection.sendall(GET + large)
        sending = threading.Thread(target=connection.sendall, args=(b"x" * size,))
        sending.start()
        sending.join(PATIENCE)
        assert (
            not sending.is_alive()
        )  # the server reads on, for else it would not notice that a client leaves
        app.open()
        assert code_of(answers(connection, 2)) == (400, "too_many_requests_at_once")
        assert [scope["method"] for scope in app.begun] == ["GET", "GET"]


def test_one_connection_does_not_hold_up_the_others() -> None:
    """Over and over, as much as the server takes."""
    with serving(ServerState()) as url, client_of(url) as client:
        for _ in range(5):
            with connect(url) as connection:
                connection.sendall(GET * 10_000)
                assert client.get("/health/live").status_code == 200
                received = read_all(connection)
                assert b"too_many_requests_at_once" in received
                assert received.count(b"HTTP/1.1 200") <= 33


@pytest.mark.parametrize("garbage", [b"nonsense\r\n\r\n", CHUNKED + b"zz\r\n"])
def test_what_came_before_garbage_is_answered(garbage: bytes) -> None:
    with gated() as (app, connection):
        connection.sendall(GET + garbage)
        wait_until_read(connection)
        app.open()
        assert code_of(answers(connection, 2)) == (400, "malformed_request")


def test_a_malformed_chunk_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="promptplex.access"):
        app = Gated()
        with serving_app(app, ApiConfig()) as url, connect(url) as connection:
            connection.sendall(CHUNKED + b"2\r\n{}\r\n")
            wait_until(lambda: app.begun)
            connection.sendall(b"zz\r\n")
            assert code_of(read_all(connection)) == (400, "malformed_request")
            wait_until(lambda: app.ends == ["left"])
    assert [record.getMessage() for record in caplog.records].count("refused") == 1


def test_trailers_are_no_headers() -> None:
    app = Gated()
    app.open()
    with serving_app(app, ApiConfig()) as url, connect(url) as connection:
        connection.sendall(
            CHUNKED + b"1\r\na\r\n0\r\nAuthorization: Bearer x\r\nExpect: 100-continue\r\n\r\n"
        )
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
    (scope,) = app.begun
    assert {name for name, _ in scope["headers"]} == {b"host", b"transfer-encoding"}


@pytest.mark.parametrize("piece", [b"a:b\r\n" * 10_000, b"a" * 50_000])
@pytest.mark.parametrize("start", [b"0\r\n", b"1\r\na\r\n0\r\n", b"1;"])
def test_trailers_and_extensions_of_chunks_are_bounded(start: bytes, piece: bytes) -> None:
    app = Gated()
    with serving_app(app, ApiConfig()) as url, connect(url) as connection:
        connection.sendall(CHUNKED + start)
        wait_until(lambda: app.begun)
        code = (400, "malformed_request") if start == b"1;" and b"\r" in piece else (431, "headers_too_large")
        connection.sendall(piece)
        if code[0] == 431:
            connection.sendall(piece)
        assert code_of(read_all(connection)) == code
        wait_until(lambda: app.ends == ["left"])


def test_trailers_after_an_answer_are_bounded_too() -> None:
    with serving(ServerState()) as url, connect(url) as connection:
        connection.sendall(CHUNKED.replace(b"/generate", b"/nothing") + b"0\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 404")
        with pytest.raises(ConnectionError):
            connection.sendall(b"a:b\r\n" * 10_000_000)


def test_refused_connections_hold_few_descriptors() -> None:
    """Beyond so many no answer is worth a descriptor."""
    with serving(ServerState(), replace(ApiConfig(), max_connections=2)) as url:
        opened = [connect(url) for _ in range(150)]
        outcomes = []
        for connection in opened[2:]:
            try:
                outcomes.append(read_all(connection))
            except ConnectionError:
                outcomes.append(b"")
        for connection in opened:
            connection.close()
    told = [outcome for outcome in outcomes if outcome]
    assert {code_of(outcome) for outcome in told} == {(503, "overloaded")}
    assert len(told) <= 64
    assert outcomes.count(b"") >= 148 - 64
