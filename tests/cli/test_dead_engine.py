"""An engine that dies under load: everybody is told, and the process ends with status 1."""

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path

from tests.cli.conftest import Server
from tests.cli.load import Load

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
