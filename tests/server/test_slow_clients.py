"""200 sockets that dribble and bodies of a gigabyte: other requests pass, memory stays, all are cut."""

import contextlib
import logging
import selectors
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from tests.bases import save_tiny_llama
from tests.cli.conftest import Server
from tests.waiting import PATIENCE

log = logging.getLogger("promptplex.tests")

DRIBBLING = 200
DEADLINE = 4.0  # instead of the server's own, so that the test needn't wait for those
GROWTH = 100 << 20
GIGABYTE = 1 << 30

# What runs first in the server's process.
SHORT_DEADLINES = f"""
import functools, app.main
app.main.ApiConfig = functools.partial(app.main.ApiConfig, head_seconds={DEADLINE}, body_seconds={DEADLINE})
"""


@dataclass
class Attacked:
    """A running server, and what was measured of it."""

    url: str
    process: psutil.Process
    memory: list[int] = field(default_factory=list)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", urlsplit(self.url).port or 0), timeout=PATIENCE)

    def ask(self, client: httpx.Client) -> float:
        """A normal request; its seconds."""
        body = {"inputs": "the film", "parameters": {"max_new_tokens": 8}}
        begin = time.monotonic()
        assert client.post("/generate", json=body).status_code == 200
        self.memory.append(self.process.memory_info().rss)
        return time.monotonic() - begin


@pytest.fixture
def attacked(tmp_path: Path) -> Iterator[Attacked]:
    base = save_tiny_llama(tmp_path / "tiny")
    flags = ("--model", str(base), "--store", str(tmp_path / "store"), "--dtype", "float32")
    with Server.running(*flags, fault=SHORT_DEADLINES) as server:
        yield Attacked(server.wait_until_ready(), psutil.Process(server.process.pid))
        assert server.end() == 0


def dribble(attacked: Attacked) -> list[bytes]:
    """A byte each now and then, half of them of headers, half of bodies; what each was answered."""
    answers: dict[socket.socket, bytes] = {}
    with selectors.DefaultSelector() as selector:
        for number in range(DRIBBLING):
            connection = attacked.connect()
            head = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            rest = b"X-Slow: " if number % 2 else b"Content-Length: 100000\r\n\r\n{"
            connection.sendall(head + rest)
            connection.setblocking(False)
            selector.register(connection, selectors.EVENT_READ)
            answers[connection] = b""
        until = time.monotonic() + PATIENCE
        while selector.get_map():
            assert time.monotonic() < until, f"{len(selector.get_map())} are still connected"
            for key, _ in selector.select(timeout=0.1):
                connection = key.fileobj  # type: ignore[assignment]
                with contextlib.suppress(ConnectionError):
                    if received := connection.recv(65536):
                        answers[connection] += received
                        continue
                selector.unregister(connection)
                connection.close()
            for key in list(selector.get_map().values()):
                with contextlib.suppress(OSError):
                    key.fileobj.send(b"a")  # type: ignore[union-attr]
            time.sleep(0.1)
    return list(answers.values())


def send_a_gigabyte(attacked: Attacked, framing: bytes, piece: bytes) -> tuple[int, bytes]:
    """Until the server stops reading: how many bytes went out, and its answer."""
    sent, answer = 0, b""
    with attacked.connect() as connection:
        head = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(head + framing + b"\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            while sent < GIGABYTE:
                connection.sendall(piece)
                sent += len(piece)
        with contextlib.suppress(ConnectionError):
            while received := connection.recv(65536):
                answer += received
    return sent, answer


@pytest.mark.slow
def test_normal_requests_pass_meanwhile(attacked: Attacked) -> None:
    """`pytest --log-cli-level=INFO` shows the figures."""
    megabyte = b"x" * (1 << 20)
    attacks: list[Callable[[], object]] = [
        lambda: dribble(attacked),
        lambda: send_a_gigabyte(attacked, b"Content-Length: %d" % GIGABYTE, megabyte),
        lambda: send_a_gigabyte(attacked, b"Transfer-Encoding: chunked", b"100000\r\n" + megabyte + b"\r\n"),
    ]
    outcomes: dict[int, object] = {}
    threads = [
        threading.Thread(target=lambda n=number, attack=attack: outcomes.__setitem__(n, attack()))
        for number, attack in enumerate(attacks)
    ]
    with httpx.Client(base_url=attacked.url, timeout=PATIENCE, trust_env=False) as client:
        before = [attacked.ask(client) for _ in range(40)][10:]
        resident = attacked.process.memory_info().rss
        attacked.memory.clear()
        for thread in threads:
            thread.start()
        during = []
        while any(thread.is_alive() for thread in threads):
            during.append(attacked.ask(client))
        after = attacked.process.num_fds()
        figures = {
            "median before, ms": statistics.median(before) * 1000,
            "median during, ms": statistics.median(during) * 1000,
            "slowest during, ms": max(during) * 1000,
            "requests during": len(during),
            "growth, MiB": (max(attacked.memory) - resident) / (1 << 20),
        }
        for name, figure in figures.items():
            log.info("%s: %.1f", name, figure)
    assert max(attacked.memory) - resident < GROWTH
    assert len(during) > 5
    answers = outcomes[0]
    assert isinstance(answers, list)
    codes = [answer.split()[1] if answer else b"reset" for answer in answers]
    assert set(codes) <= {b"408", b"reset"}  # a reset may overtake the answer
    assert codes.count(b"408") > DRIBBLING / 2
    for number in (1, 2):
        sent, answer = outcomes[number]  # type: ignore[misc]
        assert sent < GIGABYTE, "it was read to its end"
        assert answer == b"" or answer.startswith(b"HTTP/1.1 413")
    assert after < DRIBBLING
