"""Wait for events, with one generous bound: only a broken program takes as long, however busy the machine."""

import asyncio
import time
from collections.abc import Callable

PATIENCE = 120.0  # seconds
_PAUSE = 0.005  # seconds between two looks


def wait_until(condition: Callable[[], object], what: str = "it never came to pass") -> None:
    """Until `condition()` is true; fails with `what` when patience ends."""
    give_up = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < give_up, what
        time.sleep(_PAUSE)


async def eventually(condition: Callable[[], object], what: str = "it never came to pass") -> None:
    """The same for coroutines."""
    give_up = time.monotonic() + PATIENCE
    while not condition():  # what is waited for has no event
        assert time.monotonic() < give_up, what
        await asyncio.sleep(_PAUSE)
