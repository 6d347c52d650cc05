"""From the engine's thread to whoever waits: one hand-over per event loop per step."""

import asyncio
import contextlib
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from app.errors import InvalidRequest
from app.request import FinishReason, RequestTimings, TokenDelta


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A finished request, for synchronous callers."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: FinishReason
    timings: RequestTimings


class Port(Protocol):
    """Where deltas of some requests go."""

    def deliver(self, deltas: list[TokenDelta]) -> None:
        """Called on the engine's thread, once a step; must not block."""
        ...


class LoopPort:
    """Queues of one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._queues: dict[str, asyncio.Queue[TokenDelta]] = {}

    def open(self, request_id: str) -> "asyncio.Queue[TokenDelta]":
        queue: asyncio.Queue[TokenDelta] = asyncio.Queue()
        self._queues[request_id] = queue
        return queue

    def close(self, request_id: str) -> None:
        self._queues.pop(request_id, None)

    @property
    def is_unused(self) -> bool:
        return not self._queues

    def deliver(self, deltas: list[TokenDelta]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody reads any more
            self._loop.call_soon_threadsafe(self._dispatch, deltas)

    def _dispatch(self, deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            queue = self._queues.get(delta.request_id)
            if queue is not None:  # its reader may have left
                queue.put_nowait(delta)


@dataclass(slots=True)
class FuturePort:
    """One request's tokens, collected until it ends."""

    future: "Future[Completion]" = field(default_factory=Future)
    _tokens: list[TokenDelta] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.future.set_running_or_notify_cancel()  # cancelling goes through the engine

    def deliver(self, deltas: list[TokenDelta]) -> None:
        self._tokens += [delta for delta in deltas if delta.token_id is not None]
        last = deltas[-1]
        if last.error is not None:
            self.future.set_exception(last.error)
        elif last.finish is not None and last.timings is not None:
            self.future.set_result(self._completion(last.finish, last.timings))

    def _completion(self, finish: FinishReason, timings: RequestTimings) -> Completion:
        return Completion(
            token_ids=tuple(delta.token_id for delta in self._tokens if delta.token_id is not None),
            logprobs=tuple(delta.logprob for delta in self._tokens),
            finish=finish,
            timings=timings,
        )


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
        by_port: dict[int, tuple[Port, list[TokenDelta]]] = {}
        with self._lock:
            self._is_delivering = True
            for delta in deltas:
                port = self._ports.get(delta.request_id)
                if port is None:
                    continue
                by_port.setdefault(id(port), (port, []))[1].append(delta)
                if delta.is_last:
                    del self._ports[delta.request_id]
        for port, batch in by_port.values():
            port.deliver(batch)
        with self._lock:
            self._is_delivering = False
            if not self._ports:
                self._lock.notify_all()
