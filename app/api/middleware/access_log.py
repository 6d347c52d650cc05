"""The outermost layer: an id for each request, headers for each answer, a line in the log for each.

A line holds nothing of prompts or outputs.
"""

import logging
import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.auth.principal import ANONYMOUS
from app.api.middleware.headers import complete_headers, request_id
from app.request import Outcome

log = logging.getLogger("promptplex.access")

_MAX_PATH = 256
_MAX_PARTS = 1024


@dataclass(slots=True)
class RequestRecord:
    """The facts of a request in flight; generations add to it as they end."""

    request_id: str
    begin: float = field(default_factory=time.monotonic)
    status: int = 0  # 0: no answer was begun
    is_complete: bool = False
    client_left: bool = False
    task: str = ""  # "" is the base model, or that nothing was generated
    version: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    num_outcomes: int = 0
    parts: list[tuple[int, Outcome]] | None = None  # each with time.time_ns() at its end; None: not wanted


_current: ContextVar[RequestRecord | None] = ContextVar("request", default=None)


def current_record() -> RequestRecord | None:
    """Return the record of the request that the calling code works for."""
    return _current.get()


def note_outcome(outcome: Outcome) -> None:
    """Add a generation to the record of its request: the callback of the generation service.

    Each of several answers to a request counts its prompt again, since the model ran on it again.
    """
    record = _current.get()
    if record is None:
        return
    record.task, record.version = outcome.task, outcome.version
    record.prompt_tokens += outcome.prompt_tokens
    record.generated_tokens += outcome.generated_tokens
    record.num_outcomes += 1
    if record.parts is not None and len(record.parts) < _MAX_PARTS:
        record.parts.append((time.time_ns(), outcome))


def route_path(scope: Scope) -> str:
    """Return the path that routes see: without the place where this app is mounted in another."""
    return str(scope["path"].removeprefix(scope.get("root_path", "")))


def is_probe(scope: Scope) -> bool:
    """Return whether orchestrators repeat this request every few seconds, which would drown the others."""
    path = route_path(scope)
    return path == "/metrics" or path == "/health" or path.startswith("/health/")


class AccessLog:
    """Pure ASGI: nothing is buffered, and a disconnect reaches the route."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(request_id(Headers(scope=scope).get("x-request-id", "")))
        scope.setdefault("state", {})["request_id"] = record.request_id
        token = _current.set(record)
        try:
            await self._app(scope, _receiving(record, receive), _sending(record, send))
        finally:
            _current.reset(token)
            _write(scope, record)


def _receiving(record: RequestRecord, receive: Receive) -> Receive:
    async def receive_noting() -> Message:
        message = await receive()
        if message["type"] == "http.disconnect" and not record.is_complete:
            record.client_left = True
        return message

    return receive_noting


def _sending(record: RequestRecord, send: Send) -> Send:
    async def send_noting(message: Message) -> None:
        if message["type"] == "http.response.start":
            record.status = message["status"]
            message["headers"] = complete_headers(message.get("headers", ()), record.request_id)
        elif not message.get("more_body", False):
            record.is_complete = True
        await send(message)

    return send_noting


def _write(scope: Scope, record: RequestRecord) -> None:
    level = logging.DEBUG if scope["method"] == "GET" and is_probe(scope) else logging.INFO
    if not log.isEnabledFor(level):
        return
    fields: dict[str, Any] = {
        "method": scope["method"],
        "path": _printable_path(scope),
        "status": record.status,
        "ms": round((time.monotonic() - record.begin) * 1000, 1),
        "request_id": record.request_id,
        "key": _key_name(scope),
        "client_left": record.client_left or None,
    }
    if record.num_outcomes:
        fields |= {
            "task": record.task or None,
            "version": record.version or None,
            "prompt_tokens": record.prompt_tokens,
            "generated_tokens": record.generated_tokens,
        }
    known = {name: value for name, value in fields.items() if value is not None}
    # As `log.log` does, which would also look for the calling line.
    log.handle(log.makeRecord(log.name, level, "", 0, "request", (), None, extra={"fields": known}))


def _key_name(scope: Scope) -> str | None:
    principal = scope["state"].get("principal", ANONYMOUS)
    return None if principal.key is None else principal.key.name


def _printable_path(scope: Scope) -> str:
    """Return the path as received, still percent-encoded: it can't hold a line break."""
    raw: bytes = scope.get("raw_path") or quote(scope["path"]).encode()  # not every host gives the first
    return raw[:_MAX_PATH].decode("ascii", "backslashreplace")
