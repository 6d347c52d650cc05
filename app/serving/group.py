"""Several answers to one request: `n` samples, lists of prompts. All run at once, in one batch."""

import asyncio
from collections.abc import AsyncGenerator, Sequence

from app.serving.answers import GenerationAsk, GenerationResult, TextDelta
from app.serving.service import GenerationService, StartedStream


async def generate_all(service: GenerationService, asks: Sequence[GenerationAsk]) -> list[GenerationResult]:
    """Run all to their ends; where one fails, the others are cancelled and its error is raised."""
    tasks = [asyncio.ensure_future(service.generate(ask)) for ask in asks]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def start_all(service: GenerationService, asks: Sequence[GenerationAsk]) -> "StartedGroup":
    """Wait for the first piece of each; where one fails, the others are cancelled and its error is raised."""
    starting = [asyncio.ensure_future(service.start(ask)) for ask in asks]
    try:
        return StartedGroup(await asyncio.gather(*starting))
    except BaseException:
        for future in starting:
            future.cancel()
        for outcome in await asyncio.gather(*starting, return_exceptions=True):
            if isinstance(outcome, StartedStream):
                await outcome.close()
        raise


class StartedGroup:
    """Pieces of several answers as they come, each with the number of its answer."""

    def __init__(self, streams: Sequence[StartedStream]) -> None:
        self._streams = streams

    async def __aiter__(self) -> AsyncGenerator[tuple[int, TextDelta], None]:
        """All pieces of all answers; once. An error of one ends all."""
        queue: asyncio.Queue[tuple[int, TextDelta] | BaseException | None] = asyncio.Queue()

        async def read(number: int, stream: StartedStream) -> None:
            try:
                async for piece in stream:
                    queue.put_nowait((number, piece))
                queue.put_nowait(None)
            except Exception as error:
                queue.put_nowait(error)

        readers = [asyncio.ensure_future(read(*each)) for each in enumerate(self._streams)]
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
        """Cancel what still runs."""
        for stream in self._streams:
            await stream.close()
