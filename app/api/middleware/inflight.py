"""Requests in flight: their number, the memory of their bodies, and an end to bodies that still come."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator

from app.errors import EngineStopped, Overloaded


class InflightRequests:
    """Belongs to one event loop; only `wait_until_none` may be called from another thread."""

    def __init__(self) -> None:
        self.is_closed = False
        self._count = 0
        self._held_bytes = 0
        self._bodies: set[asyncio.Timeout] = set()  # one for each request that waits for more of its body
        self.parsing = asyncio.Lock()  # held by the one whose large body is parsed
        self._changed = threading.Condition()  # notified when the last one has ended

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """Count a request until it has its answer."""
        with self._changed:
            self._count += 1
        try:
            yield
        finally:
            with self._changed:
                self._count -= 1
                if not self._count:
                    self._changed.notify_all()

    def wait_until_none(self, timeout: float) -> bool:
        """Return whether all counted requests ended within `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._count, timeout)

    def take_bytes(self, count: int, bound: int) -> None:
        """Account for bytes of a body, which stay until its request ends. Raise Overloaded."""
        if self._held_bytes + count > bound:
            raise Overloaded("The bodies of requests under way fill their memory; try again shortly.")
        self._held_bytes += count

    def give_bytes(self, count: int) -> None:
        """Free the bytes of a request that has ended."""
        self._held_bytes -= count

    @contextlib.asynccontextmanager
    async def waiting_for_body(self, seconds: float) -> AsyncIterator[None]:
        """Bound a wait for the client. Raise TimeoutError, or EngineStopped when the server closes."""
        try:
            async with asyncio.timeout(0 if self.is_closed else seconds) as limit:
                self._bodies.add(limit)
                try:
                    yield
                finally:
                    self._bodies.discard(limit)
        except TimeoutError:
            if not self.is_closed:
                raise
            raise EngineStopped(
                "The server is shutting down and didn't get the whole body; send it to another replica, "
                "or again shortly.",
                retry_after=5.0,
            ) from None

    def close(self) -> None:
        """End all waits for bodies, now and from now on."""
        self.is_closed = True
        now = asyncio.get_running_loop().time()
        for limit in self._bodies:
            limit.reschedule(now)
