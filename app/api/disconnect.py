"""Clients that disconnect: their work is cancelled."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.types import Receive

from app.errors import Cancelled

_T = TypeVar("_T")


async def unless_client_leaves(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """Await `work`, but cancel it as soon as the client is gone. Raise Cancelled then."""
    return await while_connected(request.receive, work)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """Await `work` likewise, over ASGI's own `receive`; what still comes of the body is thrown away."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_client_leaves(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Cancelled("The client went away.")
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _client_leaves(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
