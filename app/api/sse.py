"""Server-sent events: bytes made by hand, sent as they come, given up when the client leaves."""

import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol, TypeVar

from pydantic import TypeAdapter
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.api.disconnect import while_connected
from app.api.errors import error_response
from app.errors import Cancelled, PromptplexError

log = logging.getLogger("promptplex.api")

_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)

_Piece = TypeVar("_Piece")
_Piece_co = TypeVar("_Piece_co", covariant=True)

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"x-accel-buffering", b"no"),  # nginx would collect what should be seen at once
]


class Started(Protocol[_Piece_co]):
    """A stream whose first piece is there already."""

    def __aiter__(self) -> AsyncIterator[_Piece_co]:
        """All pieces, once. May raise PromptplexError."""
        ...

    async def close(self) -> None:
        """Cancel what still runs."""
        ...


class EventStreamResponse(Response):
    """An ASGI response of a stream that has its first piece already: the status is decided, 200."""

    def __init__(
        self,
        stream: Started[_Piece],
        write: Callable[[_Piece], bytes],
        *,
        end: Callable[[], bytes] = bytes,
        fail: Callable[[Exception], bytes] | None = None,
    ) -> None:
        """`write` makes the events of a piece, `end` what follows the last one, `fail` that of an error."""
        super().__init__(media_type="text/event-stream")
        self._stream: Started[Any] = stream
        self._write = write
        self._end = end
        self._fail = fail or _error_event

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything, unless the client leaves; then the request is cancelled."""
        try:
            with contextlib.suppress(Cancelled):  # no client is left to answer
                await while_connected(receive, self._send_all(send))
        finally:
            await self._stream.close()

    async def _send_all(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": _HEADERS}
        await send(start)
        pieces, is_open = aiter(self._stream), True
        while is_open:
            try:
                event = self._write(await anext(pieces))
            except StopAsyncIteration:
                event, is_open = self._end(), False
            except Exception as error:
                if not isinstance(error, PromptplexError):
                    log.exception("a stream broke")
                event, is_open = self._fail(error), False
            if event:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def described_events(*data: Any) -> dict[str, Any]:
    """Describe, for the OpenAPI document, events with JSON of one of these shapes; of none: with any text."""
    text: dict[str, Any] = {"type": "string"}
    if data:
        shapes = [_whole_schema(each) for each in data]
        text |= {"contentMediaType": "application/json", "contentSchema": {"anyOf": shapes}}
    return {"itemSchema": {"type": "object", "properties": {"data": text}, "required": ["data"]}}


def _whole_schema(shape: Any) -> Any:
    """Return a shape's JSON schema without references, since the document has only its own definitions."""
    schema = TypeAdapter(shape).json_schema()
    definitions = schema.pop("$defs", {})

    def whole(part: Any) -> Any:
        if isinstance(part, list):
            return [whole(each) for each in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            return whole(definitions[part["$ref"].rpartition("/")[2]])
        return {name: whole(each) for name, each in part.items()}

    return whole(schema)


def _error_event(error: Exception) -> bytes:
    return data_event(bytes(error_response(error).body))


def data_event(payload: bytes) -> bytes:
    """Return one event with this payload, which holds no line break."""
    return b"data: " + payload + b"\n\n"


def json_bytes(value: object) -> bytes:
    """Return compact JSON in UTF-8; halves of surrogate pairs, which UTF-8 can't carry, are replaced."""
    return _JSON.encode(value).encode("utf-8", "replace")
