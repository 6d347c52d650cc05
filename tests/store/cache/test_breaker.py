"""The breaker: who is asked, when, and never again until a probe has passed."""

import asyncio
import itertools
import logging
from contextlib import asynccontextmanager, suppress

import pytest

from app.store.cache import breaker as module
from app.store.cache.breaker import FIRST_DELAY, LAST_DELAY, MAX_FAILURES, Breaker
from tests.waiting import PATIENCE, eventually


class Server:
    """Answers probes or doesn't; counts them."""

    def __init__(self, *, works: bool) -> None:
        self.works = works
        self.num_probes = 0

    async def probe(self) -> None:
        self.num_probes += 1
        if not self.works:
            raise ConnectionError("no route to the server")


@asynccontextmanager
async def running(server: Server):
    breaker = Breaker("The server", server.probe)
    task = asyncio.create_task(breaker.run())
    yield breaker
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


def test_it_is_open_until_the_first_probe_passes() -> None:
    async def scenario() -> None:
        server = Server(works=False)
        async with running(server) as breaker:
            assert breaker.is_open
            await eventually(lambda: server.num_probes >= 2)
            assert breaker.is_open
            server.works = True
            await asyncio.wait_for(breaker.wait_closed(), PATIENCE)
            assert not breaker.is_open
        assert breaker.is_open, "whoever stops the task leaves nobody to notice failures"

    asyncio.run(scenario())


def test_failures_in_a_row_open_it_and_a_probe_closes_it() -> None:
    async def scenario() -> None:
        server = Server(works=True)
        async with running(server) as breaker:
            await breaker.wait_closed()
            for _ in range(3):  # never in a row
                for _ in range(MAX_FAILURES - 1):
                    breaker.failed()
                breaker.succeeded()
            assert not breaker.is_open
            for _ in range(MAX_FAILURES):
                breaker.failed()
            assert breaker.is_open
            await asyncio.wait_for(breaker.wait_closed(), PATIENCE)
            assert not breaker.is_open

    asyncio.run(scenario())


def test_it_stays_open_as_long_as_probes_fail() -> None:
    async def scenario() -> None:
        server = Server(works=True)
        async with running(server) as breaker:
            await breaker.wait_closed()
            server.works = False
            for _ in range(MAX_FAILURES):
                breaker.failed()
            before = server.num_probes
            await eventually(lambda: server.num_probes >= before + 2)
            assert breaker.is_open
            server.works = True
            await asyncio.wait_for(breaker.wait_closed(), PATIENCE)

    asyncio.run(scenario())


def test_a_suspicion_is_looked_into_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEALTH_SECONDS", 3600.0)

    async def scenario() -> None:
        server = Server(works=True)
        async with running(server) as breaker:
            await breaker.wait_closed()
            breaker.suspect()
            await eventually(lambda: server.num_probes == 2)
            assert not breaker.is_open, "the suspicion was wrong"
            server.works = False
            breaker.suspect()
            await eventually(lambda: breaker.is_open)
            assert server.num_probes >= 2 + MAX_FAILURES

    asyncio.run(scenario())


def test_a_server_that_nobody_asks_is_known_to_be_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEALTH_SECONDS", 0.01)

    async def scenario() -> None:
        server = Server(works=True)
        async with running(server) as breaker:
            await breaker.wait_closed()
            probes = server.num_probes
            server.works = False
            await eventually(lambda: breaker.is_open)
            assert server.num_probes >= probes + MAX_FAILURES

    asyncio.run(scenario())


def test_delays_double_up_to_a_bound_and_differ_between_replicas() -> None:
    def first(count: int) -> list[float]:
        delays = module._delays()
        return [next(delays) for _ in range(count)]

    delays = first(12)
    assert FIRST_DELAY <= delays[0] <= FIRST_DELAY * 1.25
    for earlier, later in itertools.pairwise(delays):
        assert later >= min(earlier * 1.5, LAST_DELAY)
    assert max(delays) <= LAST_DELAY * 1.25
    assert first(12) != delays


def test_it_says_once_that_the_server_is_gone(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        server = Server(works=False)
        async with running(server):
            await eventually(lambda: server.num_probes >= 3)

    with caplog.at_level(logging.INFO, logger=module.__name__):
        asyncio.run(scenario())
    assert [record.getMessage() for record in caplog.records] == [
        "The server can't be reached: going on without it"
    ]
