"""Wait for events, with one generous bound: only a broken program takes as long, however busy the machine."""

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
PATIENCE = 120.0  # seconds
_PAUSE = 0.005  # seconds between two looks


def wait_until(condition: Callable[[], T], what: str = "it never came to pass") -> T:
    """Return `condition()` as soon as it is true; fail with `what` when patience ends."""
    give_up = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < give_up, what
        time.sleep(_PAUSE)
    return found


async def eventually(condition: Callable[[], object], what: str = "it never came to pass") -> None:
    """The same for coroutines."""
    give_up = time.monotonic() + PATIENCE
    while not condition():  # what is waited for has no event
        assert time.monotonic() < give_up, what
        await asyncio.sleep(_PAUSE)
