"""The answers to one request: one, `n` samples, lists of prompts. All run at once, in one batch.

All are answered by one version of the task: the reference is resolved once, for all of them.
"""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack
from dataclasses import replace

from app.concurrency import gather_or_cancel
from app.serving.generation import GenerationService, StartedStream
from app.serving.generation_request import GenerationRequest, GenerationResult, TextDelta
from app.serving.parameters import SEED_BITS


def samples(ask: GenerationRequest, count: int) -> list[GenerationRequest]:
    """`count` asks in the same words: they share the prompt and a seed, into which each hashes its number."""
    if count == 1:
        return [ask]
    fallbacks = {**ask.fallbacks, "seed": secrets.randbits(SEED_BITS)}
    return [
        replace(ask, fallbacks=fallbacks, sample_index=index, shares_prompt=True) for index in range(count)
    ]


async def generate_all(
    service: GenerationService, asks: Sequence[GenerationRequest]
) -> list[GenerationResult]:
    """Run all to their ends; an error of one ends all."""
    with service.limiter.hold(len(asks)):
        asks = await _pinned(service, asks)
        return await gather_or_cancel([service.generate(ask) for ask in asks])


async def start_all(service: GenerationService, asks: Sequence[GenerationRequest]) -> "StartedGroup":
    """Wait for the first piece of each; an error of one ends all."""
    with ExitStack() as places:
        places.enter_context(service.limiter.hold(len(asks)))
        streams = await _start(service, await _pinned(service, asks))
        return StartedGroup(streams, places.pop_all())


async def _start(service: GenerationService, asks: Sequence[GenerationRequest]) -> list[StartedStream]:
    starting = [asyncio.ensure_future(service.start(ask)) for ask in asks]
    try:
        return await asyncio.gather(*starting)
    except BaseException:
        for future in starting:
            future.cancel()
        for outcome in await asyncio.gather(*starting, return_exceptions=True):
            if isinstance(outcome, StartedStream):
                await outcome.close()
        raise


async def _pinned(service: GenerationService, asks: Sequence[GenerationRequest]) -> list[GenerationRequest]:
    """An alias that moves meanwhile must not split the answers between two versions."""
    if len(asks) == 1:
        return list(asks)
    reference = await service.pin(asks[0])
    return [replace(ask, task=reference) for ask in asks]


class StartedGroup:
    """Pieces of several answers as they come, each with the number of its answer."""

    def __init__(self, streams: Sequence[StartedStream], places: ExitStack) -> None:
        """`places` are given back when the group is closed."""
        self.streams = streams
        self._places = places

    async def __aiter__(self) -> AsyncGenerator[tuple[int, TextDelta], None]:
        """All pieces of all answers; once. An error of one ends all."""
        if len(self.streams) == 1:
            async for piece in self.streams[0]:
                yield 0, piece
            return
        queue: asyncio.Queue[tuple[int, TextDelta] | BaseException | None] = asyncio.Queue()

        async def read(number: int, stream: StartedStream) -> None:
            try:
                async for piece in stream:
                    queue.put_nowait((number, piece))
                queue.put_nowait(None)
            except Exception as error:
                queue.put_nowait(error)

        readers = [asyncio.ensure_future(read(*each)) for each in enumerate(self.streams)]
        try:
            left = len(readers)
            while left:
                item = await queue.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    left -= 1
                else:
                    yield item
        finally:
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)

    async def close(self) -> None:
        """Cancel what still runs, and give the places back."""
        with self._places:
            for stream in self.streams:
                await stream.close()
