"""The app on a real socket, in a thread."""

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx
import uvicorn
from opentelemetry.trace import Tracer
from starlette.types import ASGIApp

from app.api.app import create_app
from app.api.auth.authenticator import public
from app.api.state import ApiConfig, ServerState, Services
from app.console.pages import console_router
from app.keys.keyring import Keyring
from app.main import Replica
from app.server.connections import server_config
from app.serving.store_maintenance import StoreMaintenance
from app.serving.training_runs.service import TrainingRuns
from app.settings import Settings
from tests.serving.stack import Stack
from tests.waiting import PATIENCE, wait_until

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


def services_of(stack: Stack, training: TrainingRuns | None = None) -> Services:
    return Services(
        engine=stack.engine,
        store=stack.store,
        source=stack.source,
        generation=stack.generation,
        publishing=stack.publishing,
        metrics=stack.metrics,
        maintenance=StoreMaintenance(
            stack.store, lambda digest: stack.source.load(digest).result(PATIENCE).data
        ),
        training=training,
    )


def serving(
    state: ServerState,
    config: ApiConfig | None = None,
    keys: Keyring | None = None,
    tracer: Tracer | None = None,
    *,
    console: bool = False,
) -> AbstractContextManager[str]:
    """Serve until the block ends; yields the URL."""
    config = config or ApiConfig()
    app = create_app(state, config, keys=keys, tracer=tracer)
    if console:
        app.include_router(console_router(public))
    return serving_app(app, config)


@contextmanager
def hosted(**settings: Any) -> Iterator[str]:
    """All that `promptplex serve` serves, without a process of its own: it starts five times as fast."""
    replica = Replica(Settings(**settings))
    with serving_app(replica.app, replica.config, lifespan="on") as url:
        yield url


@contextmanager
def serving_app(app: ASGIApp, config: ApiConfig, *, lifespan: Literal["on", "off"] = "off") -> Iterator[str]:
    """The same for any app."""
    server = uvicorn.Server(server_config(app, config, port=0, lifespan=lifespan))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started or not thread.is_alive())
    assert server.started, "the server ended"
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def client_of(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=PATIENCE, trust_env=False) as client:
        yield client


def raw_exchange(url: str, head: str, *chunks: bytes, wait: float = PATIENCE) -> bytes:
    """Send bytes as they are, then read until the server closes or is silent for long."""
    with socket.create_connection(("127.0.0.1", urlsplit(url).port or 0), timeout=wait) as connection:
        connection.sendall(head.replace("\n", "\r\n").encode())
        for chunk in chunks:
            connection.sendall(chunk)
        answer = b""
        while not _is_whole(answer) and (more := connection.recv(65536)):
            answer += more
        return answer


def _is_whole(answer: bytes) -> bool:
    head, found, body = answer.removeprefix(CONTINUE).partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    return bool(found and length and len(body) >= int(length[1]))
