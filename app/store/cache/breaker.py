"""A circuit breaker: when not to ask a server that doesn't answer.

    closed --three failures in a row--> open --a probe passes--> closed

While the breaker is open no request waits for the server: only a background task probes it, ever more
rarely. While it is closed the same task probes now and then, so that an idle server is
known to be down, and one that never answers is found although no request waits so long.
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable, Iterator

_log = logging.getLogger(__name__)

MAX_FAILURES = 3  # in a row; then it opens
HEALTH_SECONDS = 2.0  # between probes while it is closed
FIRST_DELAY, LAST_DELAY = 0.25, 5.0  # seconds between probes while it is open
_JITTER = 0.25  # share of a delay: replicas must not all come back in the same moment


class Breaker:
    """A circuit breaker. Open from the start, until the first probe passes.

    Lives on one event loop; `is_open` may be read from any thread.
    """

    def __init__(self, name: str, probe: Callable[[], Awaitable[object]]) -> None:
        """`probe` pings the server, within bounded time, and raises when it fails."""
        self._name = name
        self._probe = probe
        self.is_open = True  # requests must not reach the server now
        self._num_failures = 0
        self._closed = asyncio.Event()
        self._wake = asyncio.Event()

    async def wait_closed(self) -> None:
        """Return when the server may be asked."""
        await self._closed.wait()

    def succeeded(self) -> None:
        """Note an answer of the server."""
        self._num_failures = 0

    def failed(self) -> None:
        """Note that the server gave no answer, or a malformed one."""
        self._num_failures += 1
        if self._num_failures >= MAX_FAILURES and not self.is_open:
            _log.warning("%s fails: going on without it", self._name)
            self._open()

    def suspect(self) -> None:
        """Probe now: a request has stopped waiting for an answer that may never come."""
        self._wake.set()

    async def run(self) -> None:
        """Probe forever, as the owner's background task."""
        try:
            while True:
                await self._reconnect()
                await self._watch()
                await asyncio.sleep(next(_delays()))
        finally:
            self._open()

    async def _reconnect(self) -> None:
        delays = _delays()
        while not await self._probe_passes():
            delay = next(delays)
            if self._num_failures == 1:  # it was never up; otherwise `failed` has said so
                _log.warning("%s can't be reached: going on without it", self._name)
            await asyncio.sleep(delay)
        _log.info("%s is up", self._name)
        self.is_open = False
        self._closed.set()

    async def _watch(self) -> None:
        """Return when the breaker is open."""
        while not self.is_open:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HEALTH_SECONDS):
                    await self._wake.wait()
            self._wake.clear()
            while not self.is_open and not await self._probe_passes():
                pass  # each failed probe counts, and the third opens

    async def _probe_passes(self) -> bool:
        try:
            await self._probe()
        except Exception as error:
            _log.debug("%s: a probe failed: %s", self._name, error)
            self.failed()
            return False
        self.succeeded()
        return True

    def _open(self) -> None:
        self.is_open = True
        self._closed.clear()
        self._wake.set()


def _delays() -> Iterator[float]:
    """Yield the seconds to wait after each failed probe in a row."""
    delay = FIRST_DELAY
    while True:
        yield delay * (1 + random.uniform(0, _JITTER))
        delay = min(2 * delay, LAST_DELAY)
