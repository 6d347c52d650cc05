"""Connections: httptools through uvicorn, within bounds of number, size and time.

A client must send a request's head within `head_seconds` of the connection, or of the first byte of a
later request. A client must take what it is sent: where nothing moves for `stall_seconds`, the
connection is reset, its row freed. Bodies are the business of `app/api/edge.py`.
"""

import asyncio
import functools
import logging
import resource
from typing import Any

import httptools
import uvicorn
from starlette.responses import JSONResponse
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from app.api.errors import envelope
from app.api.headers import complete_headers, request_id
from app.api.state import ApiConfig

log = logging.getLogger("promptplex.access")

_MOST_FILES = 65_536
_LINGER_SECONDS = 2.0  # a client that still sends would lose the answer to a reset
_LEAST_BYTES_A_SECOND = 1 << 10  # of a large answer, on average over `stall_seconds`


def server_config(app: ASGIApp, limits: ApiConfig, **options: Any) -> uvicorn.Config:
    """How uvicorn serves the app: on these connections, without WebSockets and its own log lines."""
    protocol: Any = functools.partial(BoundedConnection, limits=limits)
    return uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        **options,
    )


def raise_open_files() -> int:
    """Raise this process's bound of open files as far as it may; how many there may be now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return _MOST_FILES if soft == resource.RLIM_INFINITY else soft


class BoundedConnection(HttpToolsProtocol):
    """One connection. Everything runs on the event loop."""

    def __init__(self, *, limits: ApiConfig, **of_uvicorn: Any) -> None:
        super().__init__(**of_uvicorn)
        self._limits = limits
        self._expects_head = True
        self._head_bytes = 0  # of the head that comes
        self._head_clock: asyncio.TimerHandle | None = None
        self._stall_clock: asyncio.TimerHandle | None = None
        self._is_refused = False
        self._is_too_large = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock, or answer 503 where there are too many connections."""
        super().connection_made(transport)
        # What the kernel doesn't take pauses the answer at once, so `_on_stall` sees all of it.
        transport.set_write_buffer_limits(high=0)
        self._start_head_clock()
        if len(self.connections) > self._limits.max_connections:
            self._refuse(503, "overloaded", "There are too many connections; try again shortly.")

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks."""
        super().connection_lost(exc)
        self._stop_head_clock()
        self._stop_stall_clock()

    def data_received(self, data: bytes) -> None:
        """As uvicorn's, with bounds for heads, and with our envelope for what is no HTTP."""
        if self._is_refused:
            return
        self._unset_keepalive_if_required()
        if self._expects_head:
            self._head_bytes += len(data)
            self._start_head_clock()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            return  # answered as if it had not been asked for
        except httptools.HttpParserError:
            self._refuse_head(self._is_too_large)
            return
        if self._expects_head and self._head_bytes > self._limits.max_head_bytes:
            self._refuse_head(True)

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        self._start_head_clock()

    def on_headers_complete(self) -> None:
        """The head is there; it may still be too large, for it may have come at once."""
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > self._limits.max_head_bytes or len(self.headers) > self._limits.max_headers:
            self._is_too_large = True
            raise ValueError("too large")  # ends the parsing
        self._expects_head = False
        self._stop_head_clock()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The body is there; what comes next is a head."""
        super().on_message_complete()
        self._expects_head = True
        self._head_bytes = 0

    def on_response_complete(self) -> None:
        """A client that hasn't sent its body to the end yet has as much time for the rest as for a head."""
        super().on_response_complete()
        if not self._expects_head:
            self._start_head_clock()

    def pause_writing(self) -> None:
        """The client doesn't read as fast as it is written to."""
        super().pause_writing()
        self._start_stall_clock()

    def resume_writing(self) -> None:
        """It has taken everything."""
        super().resume_writing()
        self._stop_stall_clock()

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _start_head_clock(self) -> None:
        if self._head_clock is None:
            self._head_clock = self.loop.call_later(self._limits.head_seconds, self._on_late_head)

    def _stop_head_clock(self) -> None:
        if self._head_clock is not None:
            self._head_clock.cancel()
            self._head_clock = None

    def _on_late_head(self) -> None:
        self._head_clock = None
        if self._is_answering:  # an earlier request; until then nothing more may be read
            self._start_head_clock()
        elif self._expects_head and self._head_bytes:
            seconds = self._limits.head_seconds
            self._refuse(
                408,
                "request_timeout",
                f"The headers did not come within {seconds:g} seconds; send them again.",
            )
        else:
            self.transport.close()

    def _start_stall_clock(self) -> None:
        size = self.transport.get_write_buffer_size()
        self._stall_clock = self.loop.call_later(self._limits.stall_seconds, self._on_stall, size)

    def _stop_stall_clock(self) -> None:
        if self._stall_clock is not None:
            self._stall_clock.cancel()
            self._stall_clock = None

    def _on_stall(self, size: int) -> None:
        taken = size - self.transport.get_write_buffer_size()
        if taken >= _LEAST_BYTES_A_SECOND * self._limits.stall_seconds:
            self._start_stall_clock()
        else:
            self.transport.abort()

    def _refuse_head(self, is_too_large: bool) -> None:
        if is_too_large:
            size, count = self._limits.max_head_bytes, self._limits.max_headers
            message = f"The headers exceed {size} bytes or {count} in number; send fewer."
            self._refuse(431, "headers_too_large", message)
        else:
            self._refuse(400, "malformed_request", "This is no HTTP/1.1 request; look at what sends it.")

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Answer and close. Nothing more is read."""
        self._is_refused = True
        self._stop_head_clock()
        if self._is_answering:  # the next answer has no place in the midst of this one
            self.transport.close()
            return
        identity = request_id()
        log.info("refused", extra={"fields": {"status": status, "request_id": identity}})
        self.transport.write(self._written(_refusal(status, code, message), identity))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(_LINGER_SECONDS, self.transport.abort)

    def _written(self, response: JSONResponse, identity: str) -> bytes:
        own = [*self.server_state.default_headers, *response.raw_headers, (b"connection", b"close")]
        headers = b"".join(b"%s: %s\r\n" % header for header in complete_headers(own, identity))
        return STATUS_LINE[response.status_code] + headers + b"\r\n" + bytes(response.body)


def _refusal(status: int, code: str, message: str) -> JSONResponse:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    headers = {"retry-after": "1"} if status == 503 else None
    return JSONResponse(envelope(message, kind=kind, code=code), status, headers)
