"""Where a request ends: no body is lost, and none is run as a request, whatever a client asks for beside."""

import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from app.api.state import ApiConfig, ServerState
from tests.api.server import raw_exchange, serving, serving_app
from tests.server.test_connections import GET, code_of, connect, read_all

INNER = b"POST /inner HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\nno"
H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQBAAAAAAIAAAAA\r\n"
ASKED = {
    "nothing": b"",
    "h2c": H2C,
    "h2c in capitals": b"CONNECTION: UPGRADE\r\nUPGRADE: H2C\r\n",
    "two lines": b"Connection: keep-alive\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nUpgrade: foo\r\n",
    "websocket": b"Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n",
    "several": b"Connection: Upgrade\r\nUpgrade: HTTP/2.0, SHTTP/1.3, IRC/6.9, TLS/1.0\r\n",
    "no token": b"Connection: Upgrade\r\nUpgrade: \r\n",
    "no upgrade": b"Connection: Upgrade\r\n",
    "no connection": b"Upgrade: h2c\r\n",
}


class Echo:
    """Answers with what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, bytes]] = []
        self.headers: list[dict[bytes, bytes]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        self.asked.append((scope["method"], scope["path"], body))
        self.headers.append(dict(scope["headers"]))
        headers = [(b"content-length", b"4")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"done"})


@pytest.fixture(scope="module")
def echoing() -> Iterator[tuple[Echo, str]]:
    app = Echo()
    with serving_app(app, ApiConfig()) as url:
        yield app, url


@pytest.fixture
def app(echoing: tuple[Echo, str]) -> Echo:
    app, _ = echoing
    app.asked.clear()
    app.headers.clear()
    return app


@pytest.fixture
def connection(echoing: tuple[Echo, str]) -> Iterator[socket.socket]:
    with connect(echoing[1]) as opened:
        yield opened


def read_answers(connection: socket.socket, count: int) -> bytes:
    received = b""
    while received.count(b"done") < count:
        more = connection.recv(65536)
        assert more, received
        received += more
    return received


def post(asked: bytes, body: bytes, *, chunked: bool = False, method: bytes = b"POST") -> bytes:
    framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % len(body)
    head = b"%s /outer HTTP/1.1\r\nHost: localhost\r\n%s%s\r\n\r\n" % (method, asked, framing)
    return head + (b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if chunked else body)


def pieces_of(sent: bytes, how: str) -> list[bytes]:
    head, _, body = sent.partition(b"\r\n\r\n")
    if how == "in two packets":
        return [head + b"\r\n\r\n", body]
    if how == "byte by byte":
        return [bytes([byte]) for byte in sent]
    return [sent]


@pytest.mark.parametrize("how", ["at once", "in two packets", "byte by byte"])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("asked", ASKED)
def test_an_upgrade_is_ignored_and_the_body_is_read(
    app: Echo, connection: socket.socket, asked: str, chunked: bool, how: str
) -> None:
    """The body looks like a request; were it lost, it would be run as the next one."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for piece in pieces_of(post(ASKED[asked], INNER, chunked=chunked) + GET, how):
        connection.sendall(piece)
    received = read_answers(connection, 2)
    assert app.asked == [("POST", "/outer", INNER), ("GET", "/version", b"")]
    assert b"HTTP/1.1 101" not in received


def test_requests_that_all_ask_for_an_upgrade_are_answered_in_turn(
    app: Echo, connection: socket.socket
) -> None:
    count = 20
    connection.sendall(b"".join(post(H2C, b"%d" % number) for number in range(count)))
    read_answers(connection, count)
    assert [body for _, _, body in app.asked] == [b"%d" % number for number in range(count)]


@pytest.mark.parametrize("method", [b"GET", b"PUT", b"DELETE", b"OPTIONS", b"PATCH"])
def test_every_method_keeps_its_body(app: Echo, connection: socket.socket, method: bytes) -> None:
    connection.sendall(post(H2C, INNER, method=method) + GET)
    read_answers(connection, 2)
    assert app.asked == [(method.decode(), "/outer", INNER), ("GET", "/version", b"")]


def test_an_upgrade_in_trailers_is_nothing(app: Echo, connection: socket.socket) -> None:
    head = b"POST /outer HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    connection.sendall(head + b"1\r\na\r\n0\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n" + GET)
    read_answers(connection, 2)
    assert app.asked == [("POST", "/outer", b"a"), ("GET", "/version", b"")]


@pytest.mark.parametrize("target", ["localhost:443", "/generate", "*"])
def test_there_are_no_tunnels(app: Echo, connection: socket.socket, target: str) -> None:
    head = f"CONNECT {target} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(INNER)}\r\n\r\n"
    connection.sendall(GET + head.encode() + INNER + GET)
    received = read_all(connection)
    answer, _, refusal = received.partition(b"done")
    assert answer.startswith(b"HTTP/1.1 200")
    if target != "*":
        assert code_of(refusal) == (501, "not_implemented")
    assert app.asked == [("GET", "/version", b"")]


CONFLICTS = {
    "gzip, chunked": (501, "not_implemented"),
    "chunked, gzip": (400, "malformed_request"),  # the body has no end (RFC 9112, 6.3)
    "gzip": (501, "not_implemented"),
    "deflate,chunked": (501, "not_implemented"),
    "identity": (501, "not_implemented"),
    "xchunked": (501, "not_implemented"),
    "chunked;q=1": (501, "not_implemented"),
    "chunked, chunked": (400, "malformed_request"),
    "": (400, "malformed_request"),
    ",": (400, "malformed_request"),
}


@pytest.mark.parametrize("coding", CONFLICTS)
def test_transfer_codings_that_are_not_undone_are_refused(
    app: Echo, connection: socket.socket, coding: str
) -> None:
    head = f"POST /outer HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: {coding}\r\n\r\n"
    connection.sendall(head.encode() + b"2\r\n{}\r\n0\r\n\r\n" + GET)
    assert code_of(read_all(connection)) == CONFLICTS[coding]
    assert app.asked == []


@pytest.mark.parametrize(
    "lines",
    [
        "Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked",
        f"{H2C.decode()}Transfer-Encoding: gzip, chunked",
    ],
)
def test_codings_in_several_lines_are_one_list(app: Echo, connection: socket.socket, lines: str) -> None:
    connection.sendall(f"POST /outer HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n\r\n".encode() + GET)
    assert code_of(read_all(connection)) == (501, "not_implemented")
    assert app.asked == []


@pytest.mark.parametrize(
    "head",
    [
        "POST /outer HTTP/1.1\nHost: localhost\nContent-Length: 3\nTransfer-Encoding: chunked\n\n",
        "POST /outer HTTP/1.1\nHost: localhost\nTransfer-Encoding: chunked\nContent-Length: 3\n\n",
        "POST /outer HTTP/1.1\nHost: localhost\nTransfer-Encoding: gzip\nContent-Length: 3\n\n",
        "POST /outer HTTP/1.1\nHost: localhost\nContent-Length: 3\nContent-Length: 4\n\n",
        "POST /outer HTTP/1.1\nHost: localhost\nContent-Length: +3\n\n",
        "POST /outer HTTP/1.1\nHost: localhost\nContent-Length: 3, 3\n\n",
        "POST /outer HTTP/1.1\nHost: localhost\nContent-Length : 3\n\n",
        "POST /outer HTTP/1.1\nHost: localhost\n Content-Length: 3\n\n",
        "POST /outer HTTP/1.0\nHost: localhost\nTransfer-Encoding: chunked\n\n",
        "POST /outer HTTP/1.1\nHost: localhost\nConnection: upgrade\nUpgrade: h2c\nContent-Length: 3\n"
        "Transfer-Encoding: chunked\n\n",
    ],
)
def test_lengths_that_contradict_each_other_are_refused(
    app: Echo, echoing: tuple[Echo, str], head: str
) -> None:
    answer = raw_exchange(echoing[1], head, b"3\r\nabc\r\n0\r\n\r\n")
    assert code_of(answer) == (400, "malformed_request")
    assert app.asked == []


JAVA = """
import java.net.URI;
import java.net.http.*;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse.BodyHandlers;

public class Client {
    public static void main(String[] arguments) throws Exception {
        HttpClient client = HttpClient.newHttpClient();  // prefers HTTP/2, so it asks for h2c with each POST
        for (int turn = 0; turn < 3; turn++) {
            for (int size : new int[] {0, 10, 100_000}) {
                String body = "{\\"text\\": \\"" + "x".repeat(size) + "\\"}";
                HttpRequest request = HttpRequest.newBuilder(URI.create(arguments[0] + "/outer"))
                    .header("Content-Type", "application/json").POST(BodyPublishers.ofString(body)).build();
                HttpResponse<String> answer = client.send(request, BodyHandlers.ofString());
                System.out.println(answer.statusCode() + " " + answer.body());
            }
        }
    }
}
"""


@pytest.mark.skipif(shutil.which("java") is None, reason="no java here, whose HttpClient asks for h2c")
def test_the_jdks_client_is_answered(app: Echo, echoing: tuple[Echo, str], tmp_path: Path) -> None:
    source = tmp_path / "Client.java"
    source.write_text(JAVA)
    command = ["java", "-XX:TieredStopAtLevel=1", str(source), echoing[1]]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.stdout.splitlines() == ["200 done"] * 9, run.stderr
    sent: list[Any] = [json.loads(body)["text"] for _, _, body in app.asked]
    assert [len(text) for text in sent] == [0, 10, 100_000] * 3
    assert b"http2-settings" in app.headers[0]


def test_a_body_in_a_content_coding_is_refused() -> None:
    with serving(ServerState()) as url:
        for coding in ("gzip", "deflate", "br", "zstd", "x", "identity, gzip", "GZIP"):
            head = (
                f"POST /nothing HTTP/1.1\nHost: localhost\nContent-Encoding: {coding}\nContent-Length: 2\n\n"
            )
            answer = raw_exchange(url, head, b"{}")
            assert code_of(answer) == (415, "unsupported_media_type")
            assert b"accept-encoding: identity" in answer
        for coding in ("identity", "", "IDENTITY"):
            head = (
                f"POST /nothing HTTP/1.1\nHost: localhost\nContent-Encoding: {coding}\nContent-Length: 2\n\n"
            )
            assert code_of(raw_exchange(url, head, b"{}")) == (404, "not_found")
