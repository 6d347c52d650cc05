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
    """Await `work` likewise, over ASGI's own `receive`; what still comes of the body is thrown away.

    The work is a task of its own: each token of a stream resumes it, and all that awaits it as well, which is
    little there, but thirty calls deep here.
    """
    working, waiting = asyncio.ensure_future(work), asyncio.current_task()
    assert waiting is not None
    is_done = is_over = False

    def on_done(_: "asyncio.Task[_T]") -> None:
        nonlocal is_done
        if not is_over:
            is_done = True
            waiting.cancel()  # which only waits for the client

    working.add_done_callback(on_done)
    try:
        await _client_leaves(receive)
    except asyncio.CancelledError:
        if not is_done or waiting.uncancel():
            raise
    finally:
        is_over, has_left = True, not working.done()
        if has_left:
            await asyncio.sleep(0)  # the work has begun, so that what it has to give up is given up
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
    if has_left:
        raise Cancelled("The client went away.")
    return working.result()


async def _client_leaves(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
