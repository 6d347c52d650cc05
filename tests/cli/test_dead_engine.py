"""An engine that dies under load: everybody is told, and the process ends with status 1."""

import asyncio
import contextlib
import http.client
import signal
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from tests.cli.conftest import Server
from tests.cli.load import Load
from tests.waiting import PATIENCE

# From the signal on, the device fails.
FAULT = """
import signal
from app.models.decoder_only import DecoderOnly

forward, signals = DecoderOnly.forward, []
signal.signal(signal.SIGUSR1, lambda *_: signals.append(True))

def fail(*arguments):
    if signals:
        raise RuntimeError("the device fell off the bus")
    return forward(*arguments)

DecoderOnly.forward = fail
"""


def test_whoever_waits_is_told(serve: Callable[..., Server], base: Path, tmp_path: Path) -> None:
    """Streams, whole answers, samples, choices, OpenAI's routes, uploads."""
    flags = ("--model", str(base), "--store", str(tmp_path), "--dtype", "float32")
    server = serve(*flags, "--max-rows", "4", fault=FAULT)  # so that some wait
    load = Load(server.wait_until_ready(), seed=3, new_tokens=500)
    asyncio.run(load.run(lambda: server.process.send_signal(signal.SIGUSR1)))
    assert server.wait() == 1
    assert "the device fell off the bus" in server.log
    assert load.outcomes.pop("upload b'503'", 0) <= 2
    assert set(load.outcomes) <= {"finished", "refused", "ended"}, load.outcomes
    assert load.outcomes["ended"] >= 10


# The port closes, and then idle connections do, after a second in which clients came that weren't seen yet.
LATE = """
import sys
import time
import uvicorn
from app.server.process import PromptplexServer

def after_a_pause(shutdown, line):
    async def late(self, sockets=None):
        print(line, file=sys.stderr, flush=True)
        time.sleep(1)
        await shutdown(self, sockets)
    return late

PromptplexServer.shutdown = after_a_pause(PromptplexServer.shutdown, "the port closes")
uvicorn.Server.shutdown = after_a_pause(uvicorn.Server.shutdown, "idle connections close")
"""


def test_requests_that_come_as_the_server_closes_are_answered(
    serve: Callable[..., Server], base: Path, tmp_path: Path
) -> None:
    """Nothing is reset: no connection that isn't accepted yet, no idle one with bytes that aren't read."""
    server = serve("--model", str(base), "--store", str(tmp_path), fault=LATE)
    where = urlsplit(server.wait_until_ready())
    idle, new = (http.client.HTTPConnection(where.netloc, timeout=PATIENCE) for _ in range(2))
    idle.request("GET", "/health/live")
    assert idle.getresponse().read()
    server.process.send_signal(signal.SIGTERM)
    for moment, client in (("the port closes", new), ("idle connections close", idle)):
        server.wait_for(moment)
        client.request("POST", "/generate", b'{"inputs": "the film"}', {"content-type": "application/json"})
    for client in (new, idle):
        answer = client.getresponse()
        assert answer.status == 503
        assert "shutting down" in answer.read().decode()
    assert server.wait() == 0


NO_FILES = """
import resource
from app.server.process import PromptplexServer

shutdown = PromptplexServer.shutdown

async def without_files(self, sockets=None):
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    await shutdown(self, sockets)

PromptplexServer.shutdown = without_files
"""


def test_a_server_without_a_file_to_open_closes_in_order(
    serve: Callable[..., Server], base: Path, tmp_path: Path
) -> None:
    server = serve("--model", str(base), "--store", str(tmp_path), fault=NO_FILES)
    where = urlsplit(server.wait_until_ready())
    with contextlib.closing(http.client.HTTPConnection(where.netloc, timeout=PATIENCE)) as idle:
        idle.request("GET", "/health/live")
        assert idle.getresponse().read()
        assert server.end(signal.SIGTERM) == 0
        assert "Traceback" not in server.log
        assert idle.sock is not None
        assert idle.sock.recv(1) == b"", "closed, not reset"
