"""Connections: httptools through uvicorn, with bounds of number, size and time that uvicorn lacks.

A client must send a request's head within `head_seconds` of the connection, or of the first byte of a
later request. A client must read its answer: where nothing moves for `stall_seconds`, the connection is
reset and its row freed. Pipelined requests wait in memory, so they must be few and small; reading goes on
meanwhile, since a disconnect wouldn't be noticed otherwise. Bodies are bounded by the request guard.
"""

import asyncio
import functools
import logging
import select
from asyncio.trsock import TransportSocket
from dataclasses import dataclass
from typing import Any, NoReturn

import httptools
import uvicorn
from starlette.responses import JSONResponse
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from app.api.errors import refusal
from app.api.middleware.headers import complete_headers, request_id
from app.api.state import ApiConfig
from app.server.connection_limits import MOST_REFUSED, IdleConnections
from app.server.written_answers import as_http_1_0, in_one_write, is_http_1_0

log = logging.getLogger("promptplex.access")

_LINGER_SECONDS = 2.0  # a client that still sends would lose the answer to a reset
_LEAST_BYTES_A_SECOND = 1 << 10  # of a large answer, on average over `stall_seconds`
_MOST_WAITING = 32  # requests of a connection, behind the one that is answered
_MOST_WAITING_BYTES = 64 << 10  # of their heads and bodies, until none waits any more


def server_config(app: ASGIApp, limits: ApiConfig, **options: Any) -> uvicorn.Config:
    """Return a configuration of uvicorn with these connections, without WebSockets and its own log lines."""
    protocol: Any = functools.partial(BoundedConnection, limits=limits, idle=IdleConnections())
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


def _is_readable(socket: TransportSocket) -> bool:
    """Return whether bytes came, or their end, that were not read yet."""
    poll = select.poll()
    poll.register(socket, select.POLLIN)
    return bool(poll.poll(0))


class BoundedConnection(HttpToolsProtocol):
    """One connection. Everything runs on the event loop."""

    def __init__(self, *, limits: ApiConfig, idle: IdleConnections, **of_uvicorn: Any) -> None:
        super().__init__(**of_uvicorn)
        self._idle = idle
        self._limits = limits
        self._running: RequestResponseCycle | None = None  # `self.cycle` is the newest one, which may wait
        self._waiting_bytes = 0
        self._expects_head = True
        self._bytes_beside = 0  # of the head that comes, or of what comes beside a body (trailers)
        self._head_clock: asyncio.TimerHandle | None = None
        self._stall_clock: asyncio.TimerHandle | None = None
        self._refusal: _Refusal | None = None  # once it is there, nothing more is read
        self._is_too_large = False

    # asyncio declares a wider parameter than uvicorn takes; the type is uvicorn's own.
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock, or answer 503 where there are too many connections."""
        super().connection_made(transport)
        # What the kernel doesn't take pauses the answer at once, so `_on_stall` sees all of it.
        transport.set_write_buffer_limits(high=0)
        excess = len(self.connections) - self._limits.max_connections
        if excess <= 0 or self._idle.make_room():
            self._idle.add(transport)
            self._start_head_clock()
        elif excess > min(MOST_REFUSED, self._limits.max_connections):
            self._refusal = _TOO_MANY
            transport.abort()
        else:
            self._refuse(_TOO_MANY)

    def shutdown(self) -> None:
        """Close an idle connection once what has come is read: the kernel would answer it with a reset."""
        if self.transport.is_closing():
            return
        is_idle = self.cycle is None or self.cycle.response_complete
        if is_idle and _is_readable(self.transport.get_extra_info("socket")):
            self.loop.call_soon(self.shutdown)
        else:
            super().shutdown()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks, and disconnect the request that is being answered, whatever waits behind it."""
        super().connection_lost(exc)
        self._idle.discard(self.transport)
        self._stop_head_clock()
        self._stop_stall_clock()
        self._disconnect_running()

    def data_received(self, data: bytes) -> None:
        """Do as uvicorn does, with bounds for heads, and with our envelope for bytes that aren't HTTP."""
        if self._refusal is not None:
            return
        self._unset_keepalive_if_required()
        self._bytes_beside += len(data)
        if self._expects_head:
            self._start_head_clock()
        try:
            self._parse(data)
        except httptools.HttpParserError:
            if self._refusal is None:
                self._refuse_head(self._is_too_large)
            return
        if self._bytes_beside > self._limits.max_head_bytes:
            self._refuse_head(True)

    def _parse(self, data: bytes) -> None:
        """Feed the parser, and ignore upgrades (RFC 9110, 7.8), which end HTTP for it.

        A new parser gets the head once more, without the request for an upgrade, then the rest of the data.
        """
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            head, (end,) = self._head_without_upgrade(), upgrade.args
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
            self._parse(head + data[end:])

    def _head_without_upgrade(self) -> bytes:
        version = self.parser.get_http_version().encode()
        kept = [b"%s: %s\r\n" % header for header in self.headers if header[0] != b"upgrade"]
        return b"%s %s HTTP/%s\r\n%s\r\n" % (self.parser.get_method(), self.url, version, b"".join(kept))

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        self._start_head_clock()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep headers and drop trailers, which must not change a request (RFC 9110, 6.5.1)."""
        if self._expects_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Check the head's size, since all of it may have come at once, and begin or queue the request."""
        if self.parser.get_method() == b"CONNECT":
            self._end(_NO_TUNNEL)
        if self.parser.should_upgrade():
            return  # it comes again
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > self._limits.max_head_bytes or len(self.headers) > self._limits.max_headers:
            self._is_too_large = True
            raise ValueError("too large")  # ends the parsing
        self._check_codings()
        if self._is_answering:
            self._let_wait(size)
        super().on_headers_complete()
        if is_http_1_0(self.cycle):
            self.cycle.keep_alive = self.parser.should_keep_alive()  # uvicorn never does
        self._expects_head = False
        self._bytes_beside = 0
        self._idle.discard(self.transport)
        self._stop_head_clock()
        self.flow.resume_reading()  # uvicorn would not read while this one waits

    def on_body(self, body: bytes) -> None:
        """Take a part of the body, within the bounds of what may wait."""
        self._bytes_beside = 0
        if self.pipeline:
            self._let_wait(len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End the body; a head is next."""
        if self.parser.should_upgrade():
            return
        super().on_message_complete()
        self._expects_head = True
        self._bytes_beside = 0

    def on_response_complete(self) -> None:
        """Go on with the next request or a refusal.

        A client whose body hasn't ended yet gets as much time for the rest as for a head.
        """
        super().on_response_complete()
        if not self.pipeline:
            self._waiting_bytes = 0
            self._idle.add(self.transport)
        if self._refusal is not None:
            self._say_refusal()
        elif not self._expects_head:
            self._start_head_clock()

    def pause_writing(self) -> None:
        """Start the clock of a client that reads more slowly than the answer is written."""
        super().pause_writing()
        self._start_stall_clock()

    def resume_writing(self) -> None:
        """Stop that clock: everything is sent."""
        super().resume_writing()
        self._stop_stall_clock()

    @property
    def _is_answering(self) -> bool:
        running = self._running
        return running is not None and not (running.response_complete or running.disconnected)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        app = as_http_1_0(app, cycle) if is_http_1_0(cycle) else app
        super()._start_asgi_task(cycle, in_one_write(app, cycle))

    def _disconnect_running(self) -> None:
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()

    def _let_wait(self, size: int) -> None:
        """Count bytes of pipelined requests; end the parsing where they are too many."""
        self._waiting_bytes += size
        is_one_more = self._expects_head and len(self.pipeline) >= _MOST_WAITING
        if is_one_more or self._waiting_bytes > _MOST_WAITING_BYTES:
            self._end(_TOO_EARLY)

    def _check_codings(self) -> None:
        """Refuse a body in a transfer coding other than chunked (RFC 9112, 6.1)."""
        given = [value for name, value in self.headers if name == b"transfer-encoding"]
        codings = [coding.strip().lower() for coding in b",".join(given).split(b",")] if given else []
        if set(codings) - {b"chunked", b""}:
            self._end(_UNKNOWN_CODING)
        if codings and (codings != [b"chunked"] or self.parser.get_http_version() == "1.0"):
            self._end(_MALFORMED)

    def _end(self, refusal: "_Refusal") -> NoReturn:
        """End the parsing, from within a callback of the parser."""
        self._refuse(refusal)
        raise ValueError(refusal.code)

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
        elif self._expects_head and self._bytes_beside:
            seconds = self._limits.head_seconds
            message = f"The headers did not come within {seconds:g} seconds; send them again."
            self._refuse(_Refusal(408, "request_timeout", message))
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
            self._refuse(_Refusal(431, "headers_too_large", message))
        else:
            self._refuse(_MALFORMED)

    def _refuse(self, refusal: "_Refusal") -> None:
        """Read nothing more; answer after the answers to what came whole before, then close."""
        self._refusal = refusal
        self._stop_head_clock()
        self.flow.resume_reading()
        if not self._expects_head and not self._forget_newest():
            self.transport.close()
        elif not self._is_answering:
            self._say_refusal()

    def _forget_newest(self) -> bool:
        """Drop the request that came in part; False: it has an answer, in part or whole."""
        if self.pipeline:
            self.pipeline.popleft()
        elif self.cycle.response_started:
            return False
        else:
            self._disconnect_running()
        return True

    def _say_refusal(self) -> None:
        if self._refusal is None or self._is_answering or self.transport.is_closing():
            return
        identity = request_id()
        if self._refusal is not _TOO_MANY:  # for which there is a line a minute
            log.info("refused", extra={"fields": {"status": self._refusal.status, "request_id": identity}})
        self.transport.write(self._written(self._refusal.response(), identity))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(_LINGER_SECONDS, self.transport.abort)

    def _written(self, response: JSONResponse, identity: str) -> bytes:
        own = [*self.server_state.default_headers, *response.raw_headers, (b"connection", b"close")]
        headers = b"".join(b"%s: %s\r\n" % header for header in complete_headers(own, identity))
        return STATUS_LINE[response.status_code] + headers + b"\r\n" + bytes(response.body)


@dataclass(frozen=True, slots=True)
class _Refusal:
    """An answer to bytes that never become a request."""

    status: int
    code: str
    message: str

    def response(self) -> JSONResponse:
        headers = {"retry-after": "1"} if self.status == 503 else None
        return refusal(self.status, self.code, self.message, headers)


_TOO_MANY = _Refusal(503, "overloaded", "There are too many connections; try again shortly.")
_TOO_EARLY = _Refusal(
    400,
    "too_many_requests_at_once",
    f"At most {_MOST_WAITING} requests, {_MOST_WAITING_BYTES} bytes together, may wait on a connection while "
    "an earlier one is answered; wait for answers, or open more connections.",
)
_NO_TUNNEL = _Refusal(501, "not_implemented", "This is no proxy: CONNECT is not supported.")
_UNKNOWN_CODING = _Refusal(
    501,
    "not_implemented",
    "The Transfer-Encoding is not supported; send the body as it is, with a Content-Length or chunked.",
)
_MALFORMED = _Refusal(400, "malformed_request", "This is no HTTP/1.1 request; look at what sends it.")
