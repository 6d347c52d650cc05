"""The output router: from the engine's thread to its callers, one hand-over per event loop per step."""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from app.errors import InvalidRequest, PromptplexError
from app.request import TokenDelta

Output = TokenDelta | PromptplexError  # an error ends its request


def is_last(output: Output) -> bool:
    """Return whether a request ends with an output."""
    return isinstance(output, PromptplexError) or output.is_last


@dataclass(eq=False, slots=True)
class Port:
    """A request's outputs in order, for one coroutine of `loop`; an asyncio.Queue costs a multiple.

    With `is_whole` the reader wants all of them at once, and is woken when the last one is there.
    """

    loop: asyncio.AbstractEventLoop
    is_whole: bool = False
    _outputs: deque[Output] = field(default_factory=deque)
    _arrival: "asyncio.Future[None] | None" = None  # what the reader waits for

    def add(self, output: Output) -> None:
        """Add an output without waking the reader; may be called from any thread."""
        self._outputs.append(output)

    def wake(self) -> None:
        """Wake the reader; called on the loop."""
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    async def get(self) -> Output:
        """Wait for the next output."""
        while not self._outputs:
            await self.woken()
        return self._outputs.popleft()

    def take_all(self) -> Iterator[Output]:
        """Yield and forget the outputs that are there."""
        while self._outputs:
            yield self._outputs.popleft()

    def woken(self) -> "asyncio.Future[None]":
        """Return a future that is done when the reader is woken; one at a time."""
        self._arrival = self.loop.create_future()
        return self._arrival


class OutputRouter:
    """Knows the port of every open request. Thread-safe."""

    def __init__(self) -> None:
        self._ports: dict[str, Port] = {}
        self._is_delivering = False
        self._lock = threading.Condition()  # notified when the last open request has its end

    def __len__(self) -> int:
        return len(self._ports)

    def wait_until_empty(self, timeout: float) -> bool:
        """Return whether all open requests ended within `timeout` seconds."""
        with self._lock:
            return self._lock.wait_for(lambda: not (self._ports or self._is_delivering), timeout)

    def open(self, request_id: str, port: Port) -> None:
        """Register a request. Raise InvalidRequest when its id is in use."""
        with self._lock:
            if request_id in self._ports:
                raise InvalidRequest(
                    f"a request with the id '{request_id}' is already running; use a fresh id"
                )
            self._ports[request_id] = port

    def open_requests(self) -> list[str]:
        """Return the ids of all open requests."""
        with self._lock:
            return list(self._ports)

    def deliver(self, outputs: Iterable[tuple[str, Output]]) -> None:
        """Hand over a step's outputs by request id; requests that ended are forgotten."""
        by_loop: dict[asyncio.AbstractEventLoop, list[Port]] = {}
        with self._lock:
            self._is_delivering = True
            for request_id, output in outputs:
                ends = is_last(output)
                port = (self._ports.pop if ends else self._ports.get)(request_id, None)
                if port is not None:
                    port.add(output)
                    if ends or not port.is_whole:
                        by_loop.setdefault(port.loop, []).append(port)
        for loop, ports in by_loop.items():
            with contextlib.suppress(RuntimeError):  # the loop was closed, and its readers with it
                loop.call_soon_threadsafe(_wake, ports)
        with self._lock:
            self._is_delivering = False
            if not self._ports:
                self._lock.notify_all()


def _wake(ports: list[Port]) -> None:
    for port in ports:
        port.wake()
