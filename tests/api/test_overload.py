"""More requests than there is room for: all are answered, refusals come early, nothing grows unbounded."""

import asyncio
import contextlib
import json
import select
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from app.api.state import ApiConfig, ServerState
from app.errors import InvalidRequest, Overloaded
from app.serving.concurrency_limiter import ConcurrencyLimiter
from tests.api.server import client_of, services_of, serving
from tests.api.test_generate import error_of
from tests.bases import save_tiny_llama
from tests.cli.conftest import Server
from tests.serving.stack import Stack, running_stack
from tests.waiting import PATIENCE, wait_until

ROWS, QUEUE = 4, 36
BOUND = ROWS + QUEUE
MIB = 1 << 20


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A server with room for four answers."""
    with running_stack(tmp_path_factory.mktemp("store"), max_rows=1, max_queue=3) as stack:
        yield stack


def test_a_full_server_refuses_before_it_reads(small: Stack) -> None:
    with serving(ServerState(services=services_of(small))) as url, client_of(url) as client:
        with small.generation.limiter.hold(4):
            for path in (
                "/generate",
                "/",
                "/generate_stream",
                "/v1/completions",
                "/v1/chat/completions",
                "/tokenize",
            ):
                # Nothing of the body was looked at, or else it would be 422.
                refused = client.post(path, content=b"not JSON", headers={"content-type": "application/json"})
                assert error_of(refused, 503)["code"] == "overloaded"
                assert int(refused.headers["retry-after"]) >= 1
            assert client.get("/v1/models").status_code == 200
        body = {"inputs": "a", "parameters": {"max_new_tokens": 1}}
        assert client.post("/generate", json=body).status_code == 200


def test_every_answer_has_a_place(small: Stack) -> None:
    """`n`, prompts, labels: one request that needs more than there is gets none."""
    with serving(ServerState(services=services_of(small))) as url, client_of(url) as client:
        two = {"inputs": "a", "parameters": {"n": 2, "max_new_tokens": 1, "do_sample": True}}
        prompts = {"model": "tiny-base", "prompt": ["a", "b"], "max_tokens": 1}
        choices = {"inputs": "a", "parameters": {"choices": ["good", "bad"]}}
        asks = [("/generate", two), ("/v1/completions", prompts), ("/generate", choices)]
        asks.append(("/v1/completions", prompts | {"stream": True}))
        with small.generation.limiter.hold(3):
            for path, body in asks:
                assert error_of(client.post(path, json=body), 503)["code"] == "overloaded"
            assert client.post("/generate", json={"inputs": "a"}).status_code == 200
        for path, body in asks:
            assert client.post(path, json=body).status_code == 200
        never = {"inputs": "a", "parameters": {"n": 5}}
        assert "ask for fewer" in error_of(client.post("/generate", json=never), 422)["message"]
    assert small.generation.limiter.taken == 0


def test_places_are_all_or_none() -> None:
    places = ConcurrencyLimiter(3)
    with places.hold(2):
        with pytest.raises(Overloaded), places.hold(2):
            pass
        assert places.taken == 2
        places.check()
        with places.hold(1), pytest.raises(Overloaded):
            places.check()
    with pytest.raises(InvalidRequest), places.hold(4):
        pass
    assert places.taken == 0


def test_bodies_that_are_still_sent_are_bounded_together(small: Stack) -> None:
    """Each of them is small enough; what all hold is bounded too, and free again when they end."""
    config = ApiConfig(max_body_bytes=10_000)
    with serving(ServerState(services=services_of(small)), config) as url, client_of(url) as client:
        where = urlsplit(url)
        head = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with contextlib.ExitStack() as stack:
            senders = []
            for _ in range(70):
                sender = socket.create_connection((where.hostname, where.port), timeout=PATIENCE)
                senders.append(stack.enter_context(sender))
                sender.sendall(head + b"Content-Length: 10000\r\n\r\n" + b" " * 9_900)
            refused: list[socket.socket] = []
            while len(refused) < 70 - 64:
                refused, _, _ = select.select(senders, [], [], PATIENCE)
                assert refused, "nobody was refused"
            assert len(refused) == 70 - 64
            assert all(sender.recv(65536).split()[1] == b"503" for sender in refused)
        wait_until_served(client)


def wait_until_served(client: httpx.Client) -> None:
    wait_until(
        lambda: client.post("/generate", json={"inputs": "a"}).status_code == 200,
        "what the clients held is not free again",
    )


class Burst:
    """Many requests at once over sockets of their own."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.statuses: Counter[int] = Counter()

    async def run(self, count: int) -> None:
        limits = httpx.Limits(max_connections=count)
        options: dict[str, Any] = {"limits": limits, "timeout": 120, "trust_env": False}
        async with httpx.AsyncClient(base_url=self.url, **options) as client:
            await asyncio.gather(*(self._ask(client, number) for number in range(count)))

    async def _ask(self, client: httpx.AsyncClient, number: int) -> None:
        path, body = ask_of(number)
        response = await client.post(path, json=body)
        self.statuses[response.status_code] += 1
        if response.status_code == 503:
            assert int(response.headers["retry-after"]) >= 1
            assert response.json()["error"]["code"] == "overloaded"
        elif "stream" in response.request.url.path:
            assert json.loads(response.text.split("data: ")[-1])["generated_text"]
        else:
            assert response.status_code == 200, response.text


def ask_of(number: int) -> tuple[str, dict[str, Any]]:
    """Path and body: of every kind, with some text that costs time to tokenize."""
    inputs = "the food was cold and " * 50
    parameters = {"max_new_tokens": 40}
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("/generate", {"inputs": inputs, "parameters": parameters}),
        ("/generate_stream", {"inputs": inputs, "parameters": parameters}),
        ("/generate", {"inputs": inputs, "parameters": parameters | {"n": 2}}),
        ("/v1/completions", {"model": "tiny", "prompt": [inputs, "b"], "max_tokens": 40}),
    ]
    return kinds[number % len(kinds)]


class Watch:
    """Memory of a process, and the queue that it tells of, at their highest."""

    def __init__(self, url: str, pid: int) -> None:
        self._url = url
        self._process = psutil.Process(pid)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.begin = self.memory = self._process.memory_info().rss
        self.open = 0

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        with client_of(self._url) as client:
            while not self._stop.wait(0.02):
                self.memory = max(self.memory, self._process.memory_info().rss)
                queue = client.get("/health").json()["queue"]
                self.open = max(self.open, queue["running"] + queue["waiting"])


@pytest.mark.slow
def test_ten_times_the_bound_at_once(tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "tiny")
    flags = ["--model", str(base), "--store", str(tmp_path / "store"), "--dtype", "float32"]
    flags += ["--max-rows", str(ROWS), "--max-queue", str(QUEUE)]
    with Server.running(*flags) as server:
        burst = Burst(server.wait_until_ready())
        with Watch(burst.url, server.process.pid) as watch:
            asyncio.run(burst.run(10 * BOUND))
        assert sum(burst.statuses.values()) == 10 * BOUND
        assert set(burst.statuses) == {200, 503}
        assert burst.statuses[200] >= BOUND // 2  # most ask for two answers
        assert watch.open <= BOUND
        assert watch.memory - watch.begin < 400 * MIB
        with client_of(burst.url) as client:
            health = client.get("/health").json()
            assert health["queue"] == {"running": 0, "waiting": 0}
        assert server.end() == 0
        assert "Traceback" not in server.log


def test_what_is_read_from_bodies_is_bounded_too(small: Stack) -> None:
    """Where there is no room for the items of a body, that is an overload, and no fault of the body."""
    config = ApiConfig(max_body_bytes=100_000)
    body = {"inputs": "a", "parameters": {"stop_token_ids": [1] * 30_000}}
    with serving(ServerState(services=services_of(small)), config) as url, client_of(url) as client:
        assert client.post("/generate", json=body).status_code == 422  # too many ids, but there is room
        held = ServerState(services=services_of(small))
    with serving(held, config) as url, client_of(url) as client:
        held.requests.take_bytes(64 * 100_000 - 200_000, 64 * 100_000)
        error = error_of(client.post("/generate", json=body), 503)
        assert error["code"] == "overloaded"
        held.requests.give_bytes(64 * 100_000 - 200_000)
        assert client.post("/generate", json=body).status_code == 422
