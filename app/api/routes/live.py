"""`GET /ops/stream`: the running engine as server-sent events, for the console and other readers.

All readers share one snapshot a tick, which is made only while there are readers. The engine's thread
leaves its rows once a tick and never waits; a slow reader misses snapshots, and delays none.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response

from app.api.auth.authenticator import needs
from app.api.schemas.answers import ErrorEnvelope
from app.api.sse import EventStreamResponse, data_event, json_bytes
from app.api.state import Phase, ServerState, Services, services
from app.engine.client import LiveRow
from app.errors import Overloaded
from app.keys.key import Scope

router = APIRouter(tags=["operations"])

TICK_SECONDS = 0.25
MAX_READERS = 16
_RATE_TICKS = 8  # tokens per second are a mean over so many
_TIERS = ("host", "redis", "store")
_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}},
    503: {"model": ErrorEnvelope},
}


class Lanes:
    """Give every request a lane for as long as it runs: the lowest free one."""

    def __init__(self) -> None:
        self._places: dict[str, tuple[int, int]] = {}  # request id -> lane, number of the request
        self._count = 0

    def place(self, rows: tuple[LiveRow, ...]) -> list[dict[str, Any]]:
        """Return the rows in order of their lanes. Numbers replace the ids, which clients choose."""
        now = {row.request_id for row in rows}
        self._places = {name: place for name, place in self._places.items() if name in now}
        taken = {lane for lane, _ in self._places.values()}
        free = iter(sorted(set(range(len(rows) + len(taken))) - taken))
        for row in rows:
            if row.request_id not in self._places:
                self._count += 1
                self._places[row.request_id] = (next(free), self._count)
        placed = [_lane(row, *self._places[row.request_id]) for row in rows]
        return sorted(placed, key=lambda each: int(each["row"]))


def _lane(row: LiveRow, lane: int, number: int) -> dict[str, Any]:
    return {
        "row": lane,
        "request": number,
        "task": row.task or None,
        "version": row.version or None,
        "phase": "encode" if row.is_encoding else "prefill" if row.is_prefill else "decode",
        "tokens": row.num_generated,
        "source": row.source_length or None,
    }


class LiveFeed:
    """Make snapshots for all readers. Belongs to one event loop."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._readers = 0
        self._tick = 0
        self._latest = b""
        self._lanes = Lanes()
        self._rows: list[dict[str, Any]] = []
        self._tokens: deque[tuple[float, int]] = deque(maxlen=_RATE_TICKS + 1)  # when, generated so far

    def join(self, behind: Services) -> "Reader":
        """Return a new reader, to be closed in the end. Raises Overloaded beyond MAX_READERS."""
        if self._readers >= MAX_READERS:
            raise Overloaded(
                f"{MAX_READERS} readers watch the live stream already; close one of them, or read /metrics"
            )
        if not self._readers:  # drop the rows left from the last readers
            behind.engine.take_rows()
            self._tokens.clear()
        self._readers += 1
        return Reader(self, behind)

    def leave(self) -> None:
        """Count a reader less."""
        self._readers -= 1

    @property
    def is_over(self) -> bool:
        """Whether the server drains, or its engine died."""
        return self._state.phase is not Phase.READY

    def event(self, behind: Services) -> bytes:
        """Return the snapshot of this tick, made once."""
        tick = int(time.monotonic() / TICK_SECONDS)
        if tick != self._tick:
            self._latest = data_event(json_bytes(self._snapshot(behind)))
            self._tick = tick
        return self._latest

    def _snapshot(self, behind: Services) -> dict[str, Any]:
        engine, counts = behind.engine.stats(), behind.metrics.live()
        rows = behind.engine.take_rows()
        if rows is not None:
            self._rows = self._lanes.place(rows)
        elif not engine.num_running:  # otherwise a step takes longer than a tick
            self._rows = self._lanes.place(())
        return {
            "phase": str(self._state.phase),
            "model": behind.generation.base_name,
            "has_encoder": behind.engine.geometry.has_encoder,
            "rows": self._rows,
            "max_rows": behind.engine.max_rows,
            "running": engine.num_running,
            "waiting": engine.num_waiting,
            "batch_size": len(self._rows),
            "distinct_tasks": len({row["task"] for row in self._rows}),
            "steps": engine.steps,
            "generated_tokens": counts.generated_tokens,
            "tokens_per_second": self._rate(counts.generated_tokens),
            "first_token_ms": {
                "p50": _milliseconds(counts.first_token_p50),
                "p95": _milliseconds(counts.first_token_p95),
            },
            "kv_usage": round(engine.kv_usage, 4),
            "resident_prefixes": engine.resident_prefixes,
            "resident_prefix_bytes": engine.resident_prefix_bytes,
            "resident_sources": engine.num_sources,
            "tiers": _tiers(behind, counts.device_hits, counts.device_misses),
            "redis": behind.redis(),
        }

    def _rate(self, generated: int) -> float:
        self._tokens.append((time.monotonic(), generated))
        (began, before), (ended, after) = self._tokens[0], self._tokens[-1]
        return round((after - before) / (ended - began), 1) if ended > began else 0.0


class Reader:
    """One listener: a snapshot a tick, until the server drains."""

    def __init__(self, feed: LiveFeed, behind: Services) -> None:
        self._feed = feed
        self._behind = behind
        self._is_open = True

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """All snapshots from now on."""
        while True:
            is_last = self._feed.is_over
            yield self._feed.event(self._behind)
            if is_last:
                return
            await asyncio.sleep(TICK_SECONDS - time.monotonic() % TICK_SECONDS)

    async def close(self) -> None:
        """Leave the feed; again does nothing."""
        if self._is_open:
            self._is_open = False
            self._feed.leave()


def _tiers(behind: Services, device_hits: int, device_misses: int) -> dict[str, dict[str, int]]:
    """Hits and misses since the start, from the nearest tier on."""
    prompts = behind.source.stats()
    below = {
        tier: {"hits": prompts.hits.get(tier, 0), "misses": prompts.misses.get(tier, 0)} for tier in _TIERS
    }
    return {"device": {"hits": device_hits, "misses": device_misses}, **below}


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 1)


def _event(event: bytes) -> bytes:
    return event


@router.get(
    "/ops/stream",
    response_class=Response,
    responses=_ANSWERS,
    summary="Stream the running batch",
)
@needs(Scope.METRICS)
async def stream(
    request: Request,
    behind: Annotated[Services, Depends(services)],
) -> Any:
    """Send rows, queue, rates and caches four times a second, until the client or the server leaves."""
    feed = request.app.state.live
    assert isinstance(feed, LiveFeed)
    return EventStreamResponse(feed.join(behind), _event)
