"""How answers are written to a connection: in few calls of the system, and to clients of HTTP/1.0."""

import asyncio
from typing import Any

from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle


class _HeadHeld:
    """A transport that writes the head of an answer together with what follows it.

    Each write is a call of the system, which gives up Python's lock and waits for it again.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head = b""
        self.holds = False  # the next write

    def write(self, data: bytes) -> None:
        """Write, or hold until the next write."""
        if self.holds:
            self.holds, self._head = False, data
        else:
            head, self._head = self._head, b""
            self._transport.write(head + data)

    def close(self) -> None:
        """Write what is held, and close."""
        if self._head:
            self.write(b"")
        self._transport.close()

    def is_closing(self) -> bool:
        """Return whether the connection ends."""
        return self._transport.is_closing()


def in_one_write(app: Any, cycle: RequestResponseCycle) -> Any:
    """Wrap the app so that the head of an answer with a length goes with its body; others may begin late."""
    transport: Any = _HeadHeld(cycle.transport)
    cycle.transport = transport

    async def answered(scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                has_length = any(name == b"content-length" for name, _ in message["headers"])
                transport.holds = has_length and cycle.scope["method"] != "HEAD"
            await send(message)

        await app(scope, receive, sending)

    return answered


def is_http_1_0(cycle: RequestResponseCycle) -> bool:
    """Return whether the client has no chunked coding."""
    return cycle.scope["http_version"] == "1.0"


def as_http_1_0(app: Any, cycle: RequestResponseCycle) -> Any:
    """Wrap the app for clients without chunked coding: answers without a length end with the connection."""

    async def answered(scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                names = {name for name, _ in message["headers"]}
                if b"content-length" not in names:
                    cycle.keep_alive = cycle.chunked_encoding = False
                elif cycle.keep_alive and b"connection" not in names:
                    message["headers"] = [*message["headers"], (b"connection", b"keep-alive")]
            elif cycle.chunked_encoding is False and not cycle.keep_alive:
                size = len(message.get("body", b""))
                cycle.expected_content_length = max(cycle.expected_content_length, size)
            await send(message)

        await app(scope, receive, sending)

    return answered
