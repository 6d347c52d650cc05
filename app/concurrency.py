"""Threads that start before they are needed; coroutines and generators that run and end together."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any, TypeVar

_T = TypeVar("_T")
_Item = TypeVar("_Item")


class Workers(ThreadPoolExecutor):
    """A pool of `count` threads, all of which run when this returns; none is started later."""

    def __init__(self, count: int, name: str) -> None:
        """Raise RuntimeError where the system gives fewer threads; then none is left behind."""
        super().__init__(count, thread_name_prefix=name)
        all_run = threading.Barrier(count + 1)  # a thread that waits is not idle, so the next one is started
        try:
            for _ in range(count):
                self.submit(all_run.wait)
            all_run.wait()
        except BaseException:
            all_run.abort()
            self.shutdown(cancel_futures=True)
            raise


async def gather_or_cancel(work: Sequence[Coroutine[Any, Any, _T]]) -> list[_T]:
    """Return all results; where one fails, cancel the others and raise its error."""
    if len(work) == 1:
        return [await work[0]]
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def map_bounded(
    work: Callable[[_Item], Coroutine[Any, Any, _T]], items: Sequence[_Item], width: int
) -> list[_T]:
    """Return `work(item)` of all items, `width` of which run at a time; an error cancels the others."""
    results: dict[int, _T] = {}
    waiting = enumerate(items)

    async def take_turns() -> None:
        for number, item in waiting:
            results[number] = await work(item)

    await gather_or_cancel([take_turns() for _ in range(min(width, len(items)))])
    return [results[number] for number in range(len(items))]


async def interleave(
    streams: Sequence[AsyncGenerator[_T, None]], *, waits_for_all: bool = True
) -> AsyncGenerator[tuple[int, _T], None]:
    """Yield the items of all streams as they come, each with its stream's number.

    With `waits_for_all` nothing is yielded before each stream has an item or has ended. The first error of
    any stream is raised; then, and when this generator is closed, all streams are closed.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as stream:
            async for item in stream:
                yield 0, item
        return
    queue: asyncio.Queue[tuple[int, _T] | int | Exception] = asyncio.Queue()
    readers = [asyncio.ensure_future(_read(*each, queue)) for each in enumerate(streams)]
    num_open, held = len(streams), list[tuple[int, _T]]()
    silent = set(range(num_open)) if waits_for_all else set[int]()
    try:
        while num_open:
            news = await queue.get()
            if isinstance(news, Exception):
                raise news
            if isinstance(news, int):
                num_open -= 1
                silent.discard(news)
            else:
                held.append(news)
                silent.discard(news[0])
            while held and not silent:
                yield held.pop(0)
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


async def _read(
    number: int,
    stream: AsyncGenerator[_T, None],
    queue: "asyncio.Queue[tuple[int, _T] | int | Exception]",
) -> None:
    """Put a stream's items into the queue; at the end its number, or the error that ended it."""
    try:
        async with aclosing(stream):
            async for item in stream:
                queue.put_nowait((number, item))
        queue.put_nowait(number)
    except Exception as error:
        queue.put_nowait(error)
