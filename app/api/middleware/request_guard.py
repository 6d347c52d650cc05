"""What each request must pass before its route: host and origin, key, size and speed of its body.

Pure ASGI, so that nothing is buffered and a disconnect reaches the route.
"""

import asyncio
import functools
import logging
import re
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.auth.authenticator import Authenticator
from app.api.errors import error_response, refusal
from app.api.middleware.access_log import route_path
from app.api.middleware.inflight import InflightRequests
from app.api.state import PREFIX_TOKENS, ApiConfig, ServerState
from app.errors import PayloadTooLarge, PromptplexError

log = logging.getLogger("promptplex.api")

_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_UPLOAD_PATH = re.compile(r"/tasks/[^/]+/(?:versions|(training-runs)(?:/check)?)")
_UNPRINTABLE = re.compile(r"[^!-~]")
_MAX_BODIES = 64  # as many of the largest size may be held at once, where these bytes suffice
_MOST_BODY_BYTES = 64 << 20  # of bodies, and of what was read from them
_UPLOAD_ADVICE = (
    f" By default there is room for a prefix of {PREFIX_TOKENS} tokens of the base in float32. If the "
    "file also holds the base's embeddings, `promptplex push` leaves them out, as "
    "save_embedding_layers=False does."
)
_DATA_ADVICE = " `promptplex train` reads larger files."
_DRAIN_SECONDS = 2.0
_DRAIN_BYTES = 64 << 20
_LEAST_BYTES_A_SECOND = 32 << 10  # of a body, on average; 64 MiB over 1 Mbit/s come four times as fast


class RequestGuard:
    """Refuse a request, or serve it; answer exceptions that no handler expects."""

    def __init__(
        self, app: ASGIApp, config: ApiConfig, state: ServerState, authenticator: Authenticator
    ) -> None:
        self._app = app
        self._config = config
        self._state = state
        self._authenticator = authenticator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection's request."""
        if scope["type"] == "websocket":  # there are none, and none would pass what follows
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send, self._state, self._body_limit(scope))
        scope["state"]["hold"] = exchange.hold
        scope, headers = exchange.scope, Headers(scope=scope)
        denied = self._refusal(scope, headers) or self._authenticator.refusal(scope) or _coded(scope, headers)
        if denied is not None:
            await denied(scope, receive, exchange.send)
        elif exchange.declares_too_much():
            await exchange.refuse(error_response(exchange.too_large()))
            await exchange.end_refusal()
        elif self._state.draining or scope["method"] in _SAFE_METHODS:
            await self._serve(exchange)
        else:
            with self._state.requests.one():  # a drain waits for it
                await self._serve(exchange)

    async def _serve(self, exchange: "_Exchange") -> None:
        try:
            await self._app(exchange.scope, exchange.receive, exchange.send)
        except Exception as error:
            if not exchange.is_refused:  # else the route noticed that its body ended early
                log.exception("request %s: unforeseen error", exchange.scope["state"]["request_id"])
            if not exchange.is_answered:
                await error_response(error)(exchange.scope, exchange.receive, exchange.send)
        finally:
            exchange.forget_body()
        await exchange.end_refusal()

    def _body_limit(self, scope: Scope) -> "_BodyLimit":
        config = self._config
        upload = _UPLOAD_PATH.fullmatch(route_path(scope)) if scope["method"] == "POST" else None
        if upload:  # these lie on disk, and are few
            size = self._state.max_upload_bytes(config.max_upload_bytes)
            advice = _DATA_ADVICE if upload[1] else _UPLOAD_ADVICE
            return _BodyLimit(size, "--max-upload-bytes", config.body_seconds, in_memory=None, advice=advice)
        size = config.max_body_bytes
        most = max(size, min(_MAX_BODIES * size, _MOST_BODY_BYTES))
        return _BodyLimit(size, "--max-body-bytes", config.body_seconds, in_memory=most)

    def _refusal(self, scope: Scope, headers: Headers) -> JSONResponse | None:
        """Refuse pages of other sites: without keys, this server trusts every program on the machine."""
        hosts = headers.getlist("host")
        if any(_UNPRINTABLE.search(host) for host in hosts):  # which `urlsplit` would leave out
            message = "The Host header holds a tab, a space or another character that no host has."
            return refusal(400, "malformed_request", message)
        if self._config.allowed_hosts is not None and (
            len(hosts) != 1 or _host_name(hosts[0]) not in self._config.allowed_hosts
        ):
            return _forbidden(
                "The Host header names no address of this server; use http://localhost, or start the server "
                "with the name in --allowed-hosts."
            )
        if scope["method"] in _SAFE_METHODS:
            return None
        origins = headers.getlist("origin")
        if origins and all(origin in self._config.allowed_origins for origin in origins):
            return None
        if headers.get("sec-fetch-site") == "cross-site":
            return _forbidden("Requests from other sites' pages are refused (Sec-Fetch-Site).")
        if any(not self._is_own(origin, headers) for origin in origins):
            return _forbidden(
                "Requests from other origins' pages are refused (Origin); --allowed-origins names those that "
                "the server takes."
            )
        return None

    def _is_own(self, origin: str, headers: Headers) -> bool:
        if origin in self._config.allowed_origins:
            return True
        parts = _split(origin)
        return parts is not None and parts == _split(
            f"{origin.partition('://')[0]}://{headers.get('host', '')}"
        )


@dataclass(frozen=True, slots=True)
class _BodyLimit:
    size: int  # bytes of one body
    option: str  # that sets it
    seconds: float  # that the client may take for it, and more for a large one
    in_memory: int | None  # bytes of all bodies that are held in memory; None: this one isn't
    advice: str = ""


class _Exchange:
    """One request and its response: counts the body and the time that its client takes to send it."""

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, state: ServerState, limit: _BodyLimit
    ) -> None:
        self._is_head = scope["method"] == "HEAD"
        self.scope = {**scope, "method": "GET"} if self._is_head else scope
        self._state = state
        self._requests: InflightRequests = state.requests
        self.is_answered = False
        self.is_refused = False
        self._is_over = False
        self._receive = receive
        self._send = send
        self._limit = limit
        self._received = self._held = 0
        self._waited = 0.0  # for the client, in seconds; the time that the route takes isn't its fault
        self._is_whole = False
        self._lingers = False  # a refusal whose end is still to be sent

    def declares_too_much(self) -> bool:
        """Return whether Content-Length alone says that the body is too large."""
        declared = Headers(scope=self.scope).get("content-length", "0")
        return (
            declared.isascii()
            and declared.isdigit()
            and (len(declared) > 18 or int(declared) > self._limit.size)
        )

    async def receive(self) -> Message:
        """Pass on the body until it exceeds its limit or its time; then answer and end it."""
        if self._is_whole:
            return await self._receive()
        try:
            if not self.is_refused:
                return await self._receive_body()
        except TimeoutError:
            await self.refuse(_too_slow(self._received))
        except PromptplexError as error:
            await self.refuse(error_response(error))
        return {"type": "http.disconnect"}

    async def _receive_body(self) -> Message:
        """Return the next message of the body. Raise TimeoutError, PayloadTooLarge, Overloaded."""
        begin = time.monotonic()
        allowed = self._limit.seconds + self._received / _LEAST_BYTES_A_SECOND - self._waited
        async with self._requests.waiting_for_body(allowed):
            message = await self._receive()
        self._waited += time.monotonic() - begin
        size = len(message.get("body", b""))
        self._received += size
        if self._received > self._limit.size:
            raise self.too_large()
        self.hold(size)
        self._is_whole = not message.get("more_body", False)
        return message

    def hold(self, size: int) -> None:
        """Account for memory that the body takes until its request ends. Raise Overloaded."""
        if self._limit.in_memory is not None:
            self._requests.take_bytes(size, self._limit.in_memory)
            self._held += size

    def forget_body(self) -> None:
        """Free the memory that was accounted for: the request has its answer."""
        self._requests.give_bytes(self._held)
        self._held = 0

    async def send(self, message: Message) -> None:
        """Pass on the response, of HEAD the head alone, unless the request was answered already."""
        if self.is_refused or self._is_over:
            return
        is_start = message["type"] == "http.response.start"
        if is_start:
            self.is_answered = True
            if self._state.is_shutting_down:
                MutableHeaders(scope=message)["connection"] = (
                    "close"  # the next request goes to another replica
                )
        await self._send(message)
        if is_start and self._is_head:  # a stream's end needn't come, so the route is done with
            self._is_over = True
            await self._send({"type": "http.response.body"})

    def too_large(self) -> PayloadTooLarge:
        """Return the error of a body beyond its limit."""
        return PayloadTooLarge(
            f"The body exceeds {self._limit.size} bytes; the server's {self._limit.option} bounds it."
            + self._limit.advice
        )

    async def refuse(self, response: JSONResponse) -> None:
        """Answer, as far as nothing was answered yet; `end_refusal` must follow."""
        if self.is_answered:
            self.is_refused = True
            return
        self.is_answered = self.is_refused = True
        response.headers["connection"] = "close"
        start = {
            "type": "http.response.start",
            "status": response.status_code,
            "headers": response.raw_headers,
        }
        await self._send(start)
        await self._send({"type": "http.response.body", "body": bytes(response.body), "more_body": True})
        self._lingers = True

    async def end_refusal(self) -> None:
        """End a refusal: late, since a client that still sends would lose it to a reset.

        By then the request holds no memory any more, so that others have the room.
        """
        if self._lingers:
            await self._discard_body()
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _discard_body(self) -> None:
        left = _DRAIN_BYTES
        try:
            async with asyncio.timeout(_DRAIN_SECONDS):
                while left > 0:
                    message = await self._receive()
                    left -= len(message.get("body", b""))
                    if message["type"] == "http.disconnect" or not message.get("more_body", False):
                        return
        except TimeoutError:
            return


def _coded(scope: Scope, headers: Headers) -> JSONResponse | None:
    """Refuse a Content-Encoding: a small body could become a large one."""
    codings = ",".join(headers.getlist("content-encoding")).lower().split(",")
    if scope["method"] in _SAFE_METHODS or not {coding.strip() for coding in codings} - {"", "identity"}:
        return None
    message = "Bodies in a Content-Encoding are not taken; send it uncompressed, without this header."
    return refusal(415, "unsupported_media_type", message, {"accept-encoding": "identity"})


def _forbidden(message: str) -> JSONResponse:
    return refusal(403, "forbidden", message)


def _too_slow(received: int) -> JSONResponse:
    message = (
        f"The body came too slowly: {received} bytes so far, where at least {_LEAST_BYTES_A_SECOND} a second "
        "are expected; send it again over a faster connection, or a smaller one."
    )
    return refusal(408, "request_timeout", message)


def _host_name(host: str) -> str | None:
    parts = _split(f"http://{host}")
    return parts[1] if parts is not None else None


@functools.lru_cache(256)
def _split(url: str) -> tuple[str, str, int | None] | None:
    """Return scheme, host and port of an origin; None for anything else."""
    if _UNPRINTABLE.search(url):
        return None
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return None
    is_origin = not (parts.path or parts.query or parts.fragment or parts.username or parts.password)
    if parts.scheme not in ("http", "https") or not parts.hostname or not is_origin:
        return None
    return parts.scheme, parts.hostname, port
