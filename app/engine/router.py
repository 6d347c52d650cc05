"""From the engine's thread to whoever waits: one hand-over per event loop per step."""

import asyncio
import contextlib
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field

from app.errors import InvalidRequest
from app.request import FinishReason, RequestTimings, TokenDelta


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A finished request, for synchronous callers."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: FinishReason
    timings: RequestTimings


@dataclass(frozen=True, slots=True)
class StreamPort:
    """A queue that a coroutine of `loop` reads."""

    loop: asyncio.AbstractEventLoop
    queue: "asyncio.Queue[TokenDelta]" = field(default_factory=asyncio.Queue)


@dataclass(slots=True)
class FuturePort:
    """One request's tokens, collected until it ends."""

    future: "Future[Completion]" = field(default_factory=Future)
    _tokens: list[TokenDelta] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.future.set_running_or_notify_cancel()  # cancelling goes through the engine

    def take(self, delta: TokenDelta) -> None:
        """On the engine's thread, which also runs what was added to the future."""
        if delta.token_id is not None:
            self._tokens.append(delta)
        if delta.error is not None:
            self.future.set_exception(delta.error)
        elif delta.finish is not None and delta.timings is not None:
            self.future.set_result(self._completion(delta.finish, delta.timings))

    def _completion(self, finish: FinishReason, timings: RequestTimings) -> Completion:
        return Completion(
            token_ids=tuple(delta.token_id for delta in self._tokens if delta.token_id is not None),
            logprobs=tuple(delta.logprob for delta in self._tokens),
            finish=finish,
            timings=timings,
        )


Port = StreamPort | FuturePort


class OutputRouter:
    """Knows the port of every open request. Thread-safe."""

    def __init__(self) -> None:
        self._ports: dict[str, Port] = {}
        self._is_delivering = False
        self._lock = threading.Condition()  # notified when the last open request has its end

    def __len__(self) -> int:
        return len(self._ports)

    def wait_until_empty(self, timeout: float) -> bool:
        """Whether all open requests ended within `timeout` seconds."""
        with self._lock:
            return self._lock.wait_for(lambda: not (self._ports or self._is_delivering), timeout)

    def open(self, request_id: str, port: Port) -> None:
        with self._lock:
            if request_id in self._ports:
                raise InvalidRequest(
                    f"a request with the id '{request_id}' is already running; use a fresh id"
                )
            self._ports[request_id] = port

    def open_requests(self) -> list[str]:
        with self._lock:
            return list(self._ports)

    def deliver(self, deltas: Iterable[TokenDelta]) -> None:
        """Hand a step's deltas over; requests that ended are forgotten."""
        with self._lock:
            self._is_delivering = True
            addressed = [(port, delta) for delta in deltas if (port := self._port_for(delta)) is not None]
        self._hand_over(addressed)
        with self._lock:
            self._is_delivering = False
            if not self._ports:
                self._lock.notify_all()

    def _port_for(self, delta: TokenDelta) -> Port | None:
        return (self._ports.pop if delta.is_last else self._ports.get)(delta.request_id, None)

    @staticmethod
    def _hand_over(addressed: list[tuple[Port, TokenDelta]]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[StreamPort, TokenDelta]]] = {}
        for port, delta in addressed:
            if isinstance(port, StreamPort):
                by_loop.setdefault(port.loop, []).append((port, delta))
            else:
                port.take(delta)
        for loop, batch in by_loop.items():
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody reads any more
                loop.call_soon_threadsafe(_dispatch, batch)


def _dispatch(batch: list[tuple[StreamPort, TokenDelta]]) -> None:
    for port, delta in batch:
        port.queue.put_nowait(delta)
