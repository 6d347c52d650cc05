"""A server whose engine also takes work past HTTP, in one process: what HTTP costs shows in one place.

It is `promptplex serve` itself (`app.server.process.PromptplexServer`), beside a thread that obeys a pipe.
"""

import multiprocessing
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import psutil

from app.api.state import Phase
from app.request import Request
from app.server.process import PromptplexServer
from app.settings import load_settings
from benchmarks.completions import submit_all

_START_SECONDS = 300.0
_SECONDS = 600.0  # no run takes as long; a hanging one must end
_LOOK_SECONDS = 0.05


class ServedEngine:
    """Seen from the benchmark's own process; ends with its block."""

    def __init__(self, settings: dict[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, settings), daemon=True)
        self._process.start()
        theirs.close()
        if not self._pipe.poll(_START_SECONDS):
            raise RuntimeError("the server didn't come up in time")
        self.port: int = self._pipe.recv()
        self._usage = psutil.Process(self._process.pid)

    def __enter__(self) -> "ServedEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join(60)
        if self._process.is_alive():
            self._process.kill()

    def run(self, requests: Sequence[Request]) -> float:
        """Seconds that the engine takes for them, all there at once, without HTTP."""
        self._pipe.send(requests)
        seconds: float = self._pipe.recv()
        return seconds

    def cpu_seconds(self) -> float:
        """Of the server's process since its start."""
        times = self._usage.cpu_times()
        return float(times.user + times.system)


def _serve(pipe: Connection, settings: dict[str, Any]) -> None:
    server = PromptplexServer(load_settings(settings))
    threading.Thread(target=_obey, args=(pipe, server), daemon=True).start()
    server.run()


def _obey(pipe: Connection, server: PromptplexServer) -> None:
    try:
        while not server.started or server.state.phase is not Phase.READY:
            time.sleep(_LOOK_SECONDS)
        pipe.send(server.servers[0].sockets[0].getsockname()[1])
        while True:
            pipe.send(_run(server, pipe.recv()))
    except EOFError:
        server.should_exit = True


def _run(server: PromptplexServer, requests: Sequence[Request]) -> float:
    assert server.state.services is not None
    engine = server.state.services.engine
    began = time.perf_counter()
    futures = submit_all(engine, requests)
    for future in futures:
        future.result(_SECONDS)
    return time.perf_counter() - began
