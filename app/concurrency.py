"""Threads that start before they are needed, and coroutines that run together and end together."""

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

_T = TypeVar("_T")


class Workers(ThreadPoolExecutor):
    """A pool of `count` threads, all of which run when this returns; none is started later."""

    def __init__(self, count: int, name: str) -> None:
        """Raises RuntimeError where the system gives fewer threads; then none is left behind."""
        super().__init__(count, thread_name_prefix=name)
        together = threading.Barrier(count + 1)  # a thread that waits is not idle, so the next one is started
        try:
            for _ in range(count):
                self.submit(together.wait)
            together.wait()
        except BaseException:
            together.abort()
            self.shutdown(cancel_futures=True)
            raise


async def gather_or_cancel(work: Sequence[Coroutine[Any, Any, _T]]) -> list[_T]:
    """All results; where one fails, the others are cancelled and its error is raised."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
