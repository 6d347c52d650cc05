"""Bodies in JSON: read once and strictly, bounded in what they cost, refused at the first fault of a list."""

import asyncio
import json
import re
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from app.api.direct import SMALL_BYTES, DirectCall
from app.api.state import server_state
from app.errors import PromptplexError

MAX_ITEMS = 1 << 19  # commas and brackets of a body; a text of as many is longer than any base's context
MAX_NAMES = 1 << 17  # colons
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # UTF-8 has none, so that it takes an escape
_ITEM_BYTES, _NAME_BYTES = 64, 128  # an object of Python's, its place in a list; a key and its place


class JsonRoute(APIRoute):
    """A route whose body means one thing to every reader: UTF-8, and no key twice in an object."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's own handler, over a request that reads so."""
        handle, direct = super().get_route_handler(), DirectCall.of(self)

        async def strictly(request: Request) -> Response:
            own = _JsonRequest(request.scope, request.receive)
            try:
                answer = None if direct is None else await direct.answer(own)
                return await handle(own) if answer is None else answer
            except HTTPException as error:
                if isinstance(error.__cause__, PromptplexError):  # of reading; FastAPI takes all for a 400
                    raise error.__cause__ from None
                raise

        return strictly


class _JsonRequest(Request):
    async def json(self) -> Any:
        """Read a large one on a thread, one at a time.

        Raises JSONDecodeError, HTTPException, Overloaded.
        """
        if not hasattr(self, "_json"):
            body = await self.body()
            if len(body) <= SMALL_BYTES:
                self._json = _parse(body)
            else:
                async with (await server_state(self)).requests.parsing:
                    size = await asyncio.to_thread(_bytes_when_read, body)
                    self.scope["state"]["hold"](size)
                    self._json = await asyncio.to_thread(_parse, body)
        return self._json


def _bytes_when_read(body: bytes) -> int:
    """How much memory its items and names take beside their text. Raises HTTPException: too many of them."""
    num_items, num_names = sum(map(body.count, (b",", b"[", b"{"))), body.count(b":")
    if num_items > MAX_ITEMS or num_names > MAX_NAMES:
        raise HTTPException(
            413, f"The body holds more than {MAX_ITEMS} items or {MAX_NAMES} names; send fewer at once."
        )
    return num_items * _ITEM_BYTES + num_names * _NAME_BYTES


def _parse(body: bytes) -> Any:
    """What a body holds; what can't be JSON's syntax at a place is left to FastAPI's words."""
    try:
        value = json.loads(body.decode("utf-8-sig"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        _refuse(f"it is not UTF-8 at byte {error.start}")
    except json.JSONDecodeError:
        raise
    except RecursionError:
        _refuse("it nests too deeply")
    except ValueError:  # Python converts no longer ones
        _refuse("a number in it has more than 4300 digits")
    if _SURROGATE.search(body) and (path := _half_character(value)) is not None:
        raise BadText(path)
    return value


class BadText(HTTPException):
    """Text that UTF-8 can't hold; `param` is where."""

    def __init__(self, param: str) -> None:
        where = param or "The body"
        super().__init__(
            422, f"{where} holds half of a surrogate pair, which is no character; send valid Unicode."
        )
        self.param = param or None


def _half_character(value: Any) -> str | None:
    """The path to the first text, or object with a name, that holds half of a surrogate pair."""
    pending: list[tuple[tuple[Any, ...], Any]] = [((), value)]  # a place is (the one around it, its name)
    while pending:
        place, item = pending.pop()
        names = item if isinstance(item, dict) else (item,)
        if any(isinstance(text, str) and not _is_text(text) for text in names):
            return _path(place)
        if isinstance(item, dict | list):
            parts = item.items() if isinstance(item, dict) else enumerate(item)
            pending += [((place, name), part) for name, part in parts]
    return None


def _path(place: tuple[Any, ...]) -> str:
    names = []
    while place:
        place, name = place
        names.append(str(name)[:64])
    return ".".join(reversed(names))


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        _refuse(f"the key {twice[:64]!r} appears twice in an object")
    return fields


def _refuse(why: str) -> NoReturn:
    raise HTTPException(400, f"The body can't be read: {why}.")
