"""Hints that a task may have a newer release. Never trusted: they say where to look, no more.

A hint that is lost, late, forged or repeated costs time only. Here they are checked, made fewer,
and handed on.
"""

import asyncio
import logging
from collections.abc import Callable

from app.store.references import is_task_id
from app.strict_json import JsonError, canonical_json, parse_json

_log = logging.getLogger(__name__)

CHANNEL = "promptplex:releases"
MAX_WAITING = 1024  # tasks; hints beyond that are dropped
_MAX_HINT_BYTES = 1024
_PAUSE_SECONDS = 0.050  # at least so long between two hints of one task


def encode_hint(task_id: str) -> bytes:
    """Return the message to publish on the channel."""
    return canonical_json({"task": task_id})


def decode_hint(payload: bytes) -> str | None:
    """Return the task id, or None where the payload is no hint."""
    if len(payload) > _MAX_HINT_BYTES:
        return None
    try:
        hint = parse_json(payload)
    except JsonError:
        return None
    task_id = hint.get("task") if isinstance(hint, dict) else None
    return task_id if isinstance(task_id, str) and is_task_id(task_id) else None


class HintInbox:
    """From the channel to `on_hint`, which runs on a thread. Lives on one event loop."""

    def __init__(self, on_hint: Callable[[str], None]) -> None:
        self._on_hint = on_hint
        self._waiting: dict[str, None] = {}  # task ids, the oldest first
        self._arrived = asyncio.Event()

    def receive(self, payload: bytes) -> None:
        """Take a message of the channel; malformed ones are ignored."""
        task_id = decode_hint(payload)
        if task_id is not None and len(self._waiting) < MAX_WAITING:
            self._waiting[task_id] = None
            self._arrived.set()

    async def deliver(self) -> None:
        """Deliver hints forever; those of one task that arrive together become one."""
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            batch, self._waiting = self._waiting, {}
            for task_id in batch:
                await self._hand_on(task_id)
            await asyncio.sleep(_PAUSE_SECONDS)

    async def _hand_on(self, task_id: str) -> None:
        try:
            await asyncio.to_thread(self._on_hint, task_id)
        except Exception:
            _log.debug("A hint about task %s came to nothing", task_id, exc_info=True)
