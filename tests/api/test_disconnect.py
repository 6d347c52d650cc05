"""Clients that leave at any moment, the middle of their body included: nothing of them stays behind."""

import asyncio
import gc
import json
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from app.api.disconnect import while_connected
from app.api.state import ServerState
from tests.api.server import client_of, services_of, serving
from tests.api.test_generate import publish_text
from tests.serving.stack import Stack, running_stack
from tests.waiting import PATIENCE, wait_until

TASK = "left"
POOL_THREADS = 40  # anyio's pool grows with what is asked at once, up to this
_LONG = {"max_new_tokens": 150}
_MESSAGES = [{"role": "user", "content": "the film"}]


def bodies(word: str) -> list[tuple[str, str, bytes]]:
    """Path, content type and body, of every kind of request that takes a while."""
    asks: list[tuple[str, dict[str, Any]]] = [
        ("/generate", {"inputs": word, "parameters": _LONG}),
        ("/generate", {"inputs": word, "parameters": _LONG | {"n": 3}}),
        ("/generate", {"inputs": word, "parameters": {"choices": [f"label {i}" for i in range(50)]}}),
        ("/generate", {"inputs": word, "parameters": _LONG | {"vote": {"n": 20}}}),
        ("/generate_stream", {"inputs": word, "parameters": _LONG | {"vote": {"n": 20}}}),
        ("/generate", {"inputs": word, "task_id": TASK, "parameters": _LONG, "stream": True}),
        ("/generate_stream", {"inputs": word, "parameters": _LONG}),
        ("/v1/completions", {"model": "tiny-base", "prompt": [word, "a"], "n": 2, "max_tokens": 150}),
        ("/v1/completions", {"model": TASK, "prompt": word, "n": 2, "max_tokens": 150, "stream": True}),
        ("/v1/chat/completions", {"model": TASK, "messages": _MESSAGES, "max_tokens": 150, "stream": True}),
        ("/v1/responses", {"model": TASK, "input": word, "max_output_tokens": 150}),
        ("/v1/responses", {"model": TASK, "input": word, "max_output_tokens": 150, "stream": True}),
    ]
    written = [(path, "application/json", json.dumps(body).encode()) for path, body in asks]
    template = json.dumps({"template": "T: {x}", "notes": "n" * 50_000})
    form = f'--b\r\nContent-Disposition: form-data; name="task"\r\n\r\n{template}\r\n--b--\r\n'
    prompt = '--b\r\nContent-Disposition: form-data; name="prompt"; filename="p"\r\n\r\n' + "x" * 2_000_000
    uploads = [form.encode(), f"{prompt}\r\n--b--\r\n".encode()]
    path, kind = f"/tasks/{TASK}/versions", "multipart/form-data; boundary=b"
    return written + [(path, kind, upload) for upload in uploads]


def leave(url: str, request: tuple[str, str, bytes], dice: random.Random) -> None:
    """Send a request, or the beginning of it, and go: at once, after a while, or amid the answer."""
    path, kind, body = request
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
    sent = (head + f"Content-Length: {len(body)}\r\n\r\n").encode() + body
    where = urlsplit(url)
    with socket.create_connection((where.hostname, where.port), timeout=PATIENCE) as connection:
        connection.sendall(sent[: dice.randrange(len(sent))] if dice.random() < 0.3 else sent)
        match dice.randrange(3):
            case 0:
                time.sleep(dice.uniform(0, 0.2))
            case 1:
                connection.settimeout(dice.uniform(0.01, 0.3))
                with suppress(TimeoutError):
                    connection.recv(dice.randint(1, 4096))
        if dice.random() < 0.5:  # a reset instead of an orderly end
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def pending_tasks() -> int:
    """Of all event loops of this process."""
    return sum(issubclass(type(each), asyncio.Task) and not each.done() for each in gc.get_objects())


def is_idle(stack: Stack) -> bool:
    return stack.is_idle() and not stack.generation.limiter.taken


def check_leaving(store: Path, clients: int, seed: int) -> None:
    with running_stack(store) as stack, serving(state := ServerState(services=services_of(stack))) as url:
        with client_of(url) as client:
            publish_text(client, TASK, "L: {x}")
            assert client.post("/generate", json={"inputs": "a", "parameters": {"n": 4}}).status_code == 200
        requests, process = bodies(stack.talkative()), psutil.Process()
        dices = [random.Random(seed + number) for number in range(clients)]
        leave_all(url, requests, dices[:20])  # so that every pool of threads is there
        wait_until(lambda: is_idle(stack), "rows of the first clients still run")
        wait_until(lambda: state.requests.wait_until_none(1), "requests of the first clients are still open")
        tasks, files, threads = pending_tasks(), process.num_fds(), threading.active_count()

        leave_all(url, requests, dices)

        wait_until(lambda: is_idle(stack), "rows or places of clients that left are still taken")
        assert state.requests.wait_until_none(10)
        wait_until(lambda: pending_tasks() <= tasks, "tasks of clients that left are still there")
        wait_until(lambda: process.num_fds() <= files, "files of clients that left are still open")
        assert threading.active_count() <= threads + POOL_THREADS
        check_whole(stack, url)


def leave_all(url: str, requests: list[tuple[str, str, bytes]], dices: list[random.Random]) -> None:
    with ThreadPoolExecutor(25) as threads:
        list(threads.map(lambda dice: leave(url, dice.choice(requests), dice), dices))


def check_whole(stack: Stack, url: str) -> None:
    """The loop proves its integrity whenever it comes to rest; every place can be taken again."""
    with client_of(url) as client:
        assert client.post("/generate", json={"inputs": "a", "parameters": {"n": 4}}).status_code == 200
        publish_text(client, TASK, "whole again: {x}")
    wait_until(lambda: is_idle(stack), "the last request's row is still there")
    with ExitStack() as uploads:
        for _ in range(10):
            uploads.enter_context(stack.publishing.place())
    assert stack.engine.is_alive


def test_clients_that_leave_leave_nothing(tmp_path: Path) -> None:
    check_leaving(tmp_path, clients=60, seed=1)


@pytest.mark.soak
def test_a_thousand_clients_leave_nothing(tmp_path: Path) -> None:
    check_leaving(tmp_path, clients=1000, seed=1000)


def test_a_cancellation_while_work_is_given_up_is_not_lost() -> None:
    """As of a deadline or a shutdown, which comes when the client has left already."""

    async def run() -> None:
        given_up, go_on = asyncio.Event(), asyncio.Event()

        async def work() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                given_up.set()
                await go_on.wait()

        async def left() -> dict[str, str]:
            return {"type": "http.disconnect"}

        waiting = asyncio.ensure_future(while_connected(left, work()))
        await given_up.wait()
        waiting.cancel()
        await asyncio.wait({waiting}, timeout=0.01)
        go_on.set()
        await asyncio.wait({waiting})
        assert waiting.cancelled()

    asyncio.run(run())
