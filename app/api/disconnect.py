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
    working = asyncio.current_task()
    assert working is not None
    leaving = asyncio.ensure_future(_client_leaves(receive))
    has_left = False

    def on_end(_: "asyncio.Task[None]") -> None:
        nonlocal has_left
        has_left = True
        working.cancel()

    leaving.add_done_callback(on_end)
    try:
        return await work
    except asyncio.CancelledError:
        if has_left and not working.uncancel():
            raise Cancelled("The client went away.") from None
        raise
    finally:
        leaving.remove_done_callback(on_end)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)


async def _client_leaves(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
