"""SIGTERM under load: what was accepted gets a full answer or a typed error, and nothing is cut."""

import asyncio
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Server
from tests.cli.load import Load

Serve = Callable[..., Server]


def drained(serve: Serve, base: Path, store: Path, seed: int, *flags: str, new_tokens: int) -> Counter[str]:
    """Outcomes of all requests to a server that got SIGTERM under load."""
    server = serve("--model", str(base), "--store", str(store), "--dtype", "float32", *flags)
    load = Load(server.wait_until_ready(), seed, new_tokens)
    asyncio.run(load.run(lambda: server.process.send_signal(signal.SIGTERM)))
    assert server.wait() == 0, server.log
    assert "Traceback" not in server.log
    assert "Cancel" not in server.log  # uvicorn says so when it cuts responses
    return load.outcomes


def check_drain(serve: Serve, base: Path, store: Path, seed: int) -> None:
    """All that was accepted is finished, the slow uploads too."""
    outcomes = drained(serve, base, store, seed, new_tokens=60)
    assert set(outcomes) <= {"finished", "refused"}, outcomes
    assert outcomes["finished"] >= 20
    assert outcomes["refused"]


def check_short_drain(serve: Serve, base: Path, store: Path, seed: int) -> None:
    """What takes longer than the drain ends with a typed error, streams by an event."""
    outcomes = drained(serve, base, store, seed, "--drain-timeout", "0.2", new_tokens=1900)
    assert outcomes.pop("upload b'503'", 0) <= 2
    assert set(outcomes) <= {"finished", "refused", "ended"}, outcomes
    assert outcomes["ended"] >= 5


def test_what_was_accepted_is_finished(serve: Serve, base: Path, tmp_path: Path) -> None:
    check_drain(serve, base, tmp_path, 0)


def test_what_takes_longer_than_the_drain_is_told(serve: Serve, base: Path, tmp_path: Path) -> None:
    check_short_drain(serve, base, tmp_path, 2)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(100, 150))
def test_fifty_drains(serve: Serve, base: Path, tmp_path: Path, seed: int) -> None:
    (check_short_drain if seed % 5 == 0 else check_drain)(serve, base, tmp_path, seed)
