"""A TCP proxy between a client and Redis that does, when told to, what networks and bugs do."""

import asyncio
import contextlib
import random
import threading
from collections.abc import Coroutine
from enum import StrEnum
from typing import Any, TypeVar

_T = TypeVar("_T")

_READ_BYTES = 1 << 16
_DELAY_SECONDS = 0.030  # longer than a hedge, shorter than a timeout


class Fault(StrEnum):
    """What happens to replies; REFUSE and BLACK_HOLE concern everything."""

    NONE = "none"
    DELAY = "delay"
    CUT = "cut"  # half of what came, then the end of the connection
    BLACK_HOLE = "black_hole"  # accepts, swallows, never answers
    REFUSE = "refuse"  # resets every connection
    CORRUPT = "corrupt"  # one byte of each piece changes
    SWAP = "swap"  # each reply is the one before it, on whichever connection that was


class FaultProxy:
    """Listens on `port`; runs on a thread of its own."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._fault = Fault.NONE
        self._random = random.Random(0)
        self._last_reply = b""
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy")
        self._thread.start()
        self._server = self._call(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port: int = self._server.sockets[0].getsockname()[1]

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def set(self, fault: Fault) -> None:
        """From now on, for connections that are open too."""
        self._call(self._set(fault))

    def close(self) -> None:
        self._call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10.0)

    async def _set(self, fault: Fault) -> None:
        self._fault = fault
        if fault is Fault.REFUSE:
            self._abort_all()

    async def _stop(self) -> None:
        self._server.close()
        self._abort_all()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _abort_all(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        try:
            if self._fault is not Fault.REFUSE:
                await self._relay(reader, writer)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()
            self._writers.discard(writer)
            self._tasks.discard(task)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        self._writers.add(upstream_writer)
        directions = [
            asyncio.create_task(self._requests(reader, upstream_writer)),
            asyncio.create_task(self._replies(upstream_reader, writer)),
        ]
        try:
            await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for direction in directions:
                direction.cancel()
            await asyncio.gather(*directions, return_exceptions=True)
            upstream_writer.transport.abort()
            self._writers.discard(upstream_writer)

    async def _requests(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(_READ_BYTES):
            if self._fault is not Fault.BLACK_HOLE:
                writer.write(data)
                await writer.drain()

    async def _replies(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(_READ_BYTES):
            if self._fault is Fault.BLACK_HOLE:
                continue
            if self._fault is Fault.DELAY:
                await asyncio.sleep(_DELAY_SECONDS)
            writer.write(self._spoiled(data))
            with contextlib.suppress(ConnectionError):
                await writer.drain()
            if self._fault is Fault.CUT:
                return

    def _spoiled(self, data: bytes) -> bytes:
        if self._fault is Fault.CUT:
            return data[: len(data) // 2]
        if self._fault is Fault.CORRUPT:
            position = self._random.randrange(len(data))
            return data[:position] + bytes([data[position] ^ 0x55]) + data[position + 1 :]
        if self._fault is Fault.SWAP:
            data, self._last_reply = self._last_reply or data, data
        return data
