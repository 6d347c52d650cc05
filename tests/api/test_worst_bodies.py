"""The worst bodies that a stranger can send, 64 at once: others are answered meanwhile, and memory stays."""

import asyncio
import json
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import httpx
import psutil
import pytest

from tests.api.server import client_of
from tests.bases import save_tiny_llama
from tests.cli.conftest import Server
from tests.processes import FORKS

log = logging.getLogger("promptplex.tests")

MIB = 1 << 20
AT_ONCE = 64
STALL_SECONDS = 0.25
GROWTH = 300 * MIB
SIZE = 4 * MIB - 200  # the largest body that is taken by default

pytestmark = pytest.mark.soak


def filled(head: str, piece: str, tail: str) -> bytes:
    """A body of `SIZE`, of pieces."""
    count = (SIZE - len(head) - len(tail)) // len(piece)
    return (head + piece * count + tail).encode()


def enumerated(head: str, count: int, tail: str, value: str = "") -> bytes:
    """Different strings, or names with a value each."""
    return (head + ",".join(f'"{number:08}"{value}' for number in range(count)) + tail).encode()


def task(template: str) -> bytes:
    part = b'--b\r\nContent-Disposition: form-data; name="task"\r\n\r\n%s\r\n--b--\r\n'
    return part % json.dumps({"template": template}).encode()


V1 = '{"model": "tiny", '
CHAT = '{"model": "tiny", "messages": '
WORST: dict[str, tuple[str, bytes]] = {
    "a huge text, truncated": (
        "/generate",
        filled('{"parameters": {"truncate": 1}, "inputs": "', "film ", '"}'),
    ),
    "a huge text of one word": (
        "/generate",
        filled('{"parameters": {"truncate": 1}, "inputs": "', "a", '"}'),
    ),
    "a huge text of escapes": ("/generate", filled('{"inputs": "', "\\u00e9", '"}')),
    "bad ids": ("/v1/completions", filled(V1 + '"prompt": [', "-1, ", "-1]}")),
    "good ids": ("/v1/completions", filled(V1 + '"prompt": [', "12345, ", "1]}")),
    "many small ids": ("/v1/completions", filled(V1 + '"prompt": [', "1,", "1]}")),
    "many prompts": ("/v1/completions", filled(V1 + '"prompt": [', '"aa",', '"a"]}')),
    "lists of ids": ("/v1/completions", filled(V1 + '"prompt": [', "[1,-1],", "[1]]}")),
    "many messages": ("/v1/chat/completions", filled(CHAT + "[", '{"role":"user","content":"a"},', "{}]}")),
    "a huge message": ("/v1/chat/completions", filled(CHAT + '[{"role":"user","content":"', "a b ", '"}]}')),
    "many parts": ("/v1/chat/completions", filled(CHAT + '[{"role":"user","content":[', "{},", "{}]}]}")),
    "many items": (
        "/v1/responses",
        filled('{"model": "tiny", "input": [', '{"role":"user","content":"a"},', "{}]}"),
    ),
    "many item parts": (
        "/v1/responses",
        filled('{"model": "tiny", "input": [{"role":"user","content":[', "{},", "{}]}]}"),
    ),
    "many names": ("/generate", filled('{"inputs": {"a": "', '","aaaaaaaa":"', '"}}')),
    "labels": ("/generate", filled('{"inputs":"a","parameters":{"choices":[', '"abc",', '"a"]}}')),
    "deep JSON": ("/generate", filled('{"inputs": ', "[", "")),
    "deep objects": ("/generate", filled("", '{"a":', "")),
    "a long number": ("/generate", filled('{"inputs": ', "1", "}")),
    "text to tokenize": ("/tokenize", filled('{"inputs": "', "the food ", '"}')),
    "ids to detokenize": ("/detokenize", filled('{"ids": [', "12,", "1]}")),
    "a schema": (
        "/v1/completions",
        filled(V1 + '"prompt":"a","structured_outputs":{"json":{"enum":[', '"ab",', '"a"]}}}'),
    ),
    "a schema of many strings": (
        "/v1/completions",
        enumerated(V1 + '"prompt":"a","structured_outputs":{"json":{"enum":[', 300_000, "]}}}"),
    ),
    "a schema of many properties": (
        "/v1/completions",
        enumerated(V1 + '"prompt":"a","structured_outputs":{"json":{"properties":{', 30_000, "}}}}", ":{}"),
    ),
    "unknown names": ("/generate", enumerated('{"inputs":"a","parameters":{', 130_000, "}}", ":1")),
    "fields": ("/generate", enumerated('{"inputs":{', 130_000, "}}", ':"a"')),
    "metadata": ("/v1/completions", enumerated(V1 + '"prompt":"a","metadata":{', 120_000, "}}", ':"a"')),
    "placeholders": ("/tasks/worst/versions", task("{x}" * 21_000)),
}


class Watch:
    """Memory of a process and how long its `/health/live` takes, at their highest."""

    def __init__(self, url: str, pid: int) -> None:
        self._url, self._process = url, psutil.Process(pid)
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=work) for work in (self._weigh, self._probe)]
        self.begin = self.memory = self._process.memory_info().rss
        self.stall = 0.0

    def __enter__(self) -> "Watch":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _weigh(self) -> None:
        while not self._stop.wait(0.005):
            self.memory = max(self.memory, self._process.memory_info().rss)

    def _probe(self) -> None:
        with client_of(self._url) as client:
            while not self._stop.wait(0.01):
                begin = time.monotonic()
                assert client.get("/health/live").status_code == 200
                self.stall = max(self.stall, time.monotonic() - begin)


async def send(url: str, path: str, body: bytes) -> set[int]:
    is_upload = path.endswith("/versions")
    headers = {"content-type": "multipart/form-data; boundary=b" if is_upload else "application/json"}
    limits = httpx.Limits(max_connections=AT_ONCE)
    options: dict[str, Any] = {"limits": limits, "timeout": 300, "trust_env": False}
    async with httpx.AsyncClient(base_url=url, **options) as client:
        asks = [client.post(path, content=body, headers=headers) for _ in range(AT_ONCE)]
        answers = await asyncio.gather(*asks, return_exceptions=True)
    return {answer.status_code if isinstance(answer, httpx.Response) else 0 for answer in answers}


def send_all(url: str, path: str, body: bytes) -> set[int]:
    return asyncio.run(send(url, path, body))


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[ProcessPoolExecutor]:
    """A process of its own sends, so that it doesn't hold up the one that measures."""
    with ProcessPoolExecutor(1, FORKS) as pool:
        yield pool


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    root = tmp_path_factory.mktemp("worst")
    base = save_tiny_llama(root / "tiny", positions=131_072)
    with Server.running(
        "--model", str(base), "--store", str(root / "store"), "--dtype", "float32"
    ) as running:
        url = running.wait_until_ready()
        with client_of(url) as client:  # so that what the first request loads is no growth
            assert client.post("/generate", json={"inputs": "the film"}).status_code == 200
        yield url, running.process.pid


@pytest.mark.parametrize("worst", WORST)
def test_nobody_waits_for_the_worst_bodies(
    server: tuple[str, int], elsewhere: ProcessPoolExecutor, worst: str
) -> None:
    url, pid = server
    path, body = WORST[worst]
    with Watch(url, pid) as watch:
        statuses = elsewhere.submit(send_all, url, path, body).result()
    grown = (watch.memory - watch.begin) / MIB
    figures = f"{worst}: {sorted(statuses)}, {grown:.0f} MB more, stall {watch.stall * 1000:.0f} ms"
    log.info("%s", figures)
    assert 500 not in statuses, figures
    assert watch.memory - watch.begin < GROWTH, figures
    assert watch.stall < STALL_SECONDS, figures
