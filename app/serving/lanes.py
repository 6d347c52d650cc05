"""Threads for work on texts: short ones never wait for long ones, which run one at a time, shortest first."""

import asyncio
import contextlib
import heapq
import itertools
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

from app.concurrency import Workers

_T = TypeVar("_T")

LONG = 16_384  # characters, or as many bytes of ids
_THREADS_FOR_SHORT = 4


class Lanes:
    """Runs work on threads. Belongs to one event loop."""

    def __init__(self) -> None:
        self._short = Workers(_THREADS_FOR_SHORT, "admission")
        self._long = Workers(1, "long-texts")
        self._is_taken = False
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()

    def close(self) -> None:
        """End the threads; what waits for one is cancelled."""
        for pool in (self._short, self._long):
            pool.shutdown(cancel_futures=True)

    async def run(self, work: Callable[[], _T], size: int = 0) -> _T:
        """Run `work` on a text of `size`; return its result. Cancelled while it waits, it never begins."""
        loop = asyncio.get_running_loop()
        if size <= LONG:
            return await loop.run_in_executor(self._short, work)
        async with self._turn(size):
            return await loop.run_in_executor(self._long, work)

    @contextlib.asynccontextmanager
    async def _turn(self, size: int) -> AsyncIterator[None]:
        if self._is_taken:
            await self._wait(size)
        self._is_taken = True
        try:
            yield
        finally:
            self._pass_on()

    async def _wait(self, size: int) -> None:
        turn = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (size, next(self._numbers), turn))
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it came at the same moment
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        while self._waiting:
            _, _, turn = heapq.heappop(self._waiting)
            if not turn.done():
                turn.set_result(None)
                return
        self._is_taken = False
