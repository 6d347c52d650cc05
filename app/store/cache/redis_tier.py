"""Redis as a tier: prompts' canonical bytes by digest, and hints of releases. A cache, never trusted.

    promptplex:blob:<digest>        total length (8 bytes, little-endian), then the first 8 MB
    promptplex:blob:<digest>:<i>    the i-th 8 MB after them, written before the key above

Every failure here is a miss. A breaker keeps requests away from a server that fails, and from
one that has not answered yet.
"""

import asyncio
import contextlib
import functools
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Literal, TypeVar

from redis.exceptions import ResponseError

from app.store.cache.breaker import Breaker
from app.store.cache.redis_connections import RedisConnections, UnexpectedReply
from app.store.cache.redis_url import parse_redis_url
from app.store.cache.release_hints import CHANNEL, MAX_WAITING, HintInbox, encode_hint

_log = logging.getLogger(__name__)

KEY_PREFIX = "promptplex:blob:"
CHUNK_BYTES = 8_000_000
MAX_BLOB_BYTES = 256 << 20
TTL_SECONDS = 7 * 24 * 3600
READ_SECONDS = 0.150  # for one chunk, connecting included: a request waits
WRITE_SECONDS = 1.0  # for one chunk: no request waits
PROBE_SECONDS = 0.5  # time for some sentinels of which the first doesn't answer
_RELISTEN_SECONDS = 0.5
_HEADER_BYTES = 8

_T = TypeVar("_T")


class RedisTier:
    """A RemoteTier, and the channel of release hints. Starts with Redis down, too.

    Lives on the event loop that `start` is called on; `publish_hint`, `is_up` and `state` are for any
    thread.
    """

    def __init__(self, url: str, *, on_hint: Callable[[str], None] = lambda task_id: None) -> None:
        """`on_hint` gets task ids, on a thread of its own. Raise ValueError where the URL is malformed."""
        self._connections = RedisConnections(parse_redis_url(url))
        self._breaker = Breaker("Redis", self._ping)
        self._inbox = HintInbox(on_hint)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._publishing: set[asyncio.Task[int | None]] = set()
        self._writing = asyncio.Lock()  # one blob at a time: reads must always find a connection
        self._complaint = ""

    @property
    def is_up(self) -> bool:
        """Return whether Redis is asked: False before its first answer, and while it fails."""
        return not self._breaker.is_open

    def state(self) -> Literal["up", "down"]:
        """Return the state for the health route."""
        return "up" if self.is_up else "down"

    async def start(self) -> None:
        """Start to connect and to listen, in the background."""
        self._loop = asyncio.get_running_loop()
        for work in (self._breaker.run(), self._listen(), self._inbox.deliver()):
            task = self._loop.create_task(work)
            self._tasks.add(task)
            task.add_done_callback(_report_crash)

    async def close(self) -> None:
        """Stop the background tasks, and close the connections."""
        self._loop = None
        tasks = [*self._tasks, *self._publishing]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._connections.close()

    async def get(self, digest: str) -> bytes | None:
        """Return what bytes Redis holds of this digest, perhaps wrong ones, or None. It may be cancelled."""
        if not self.is_up:
            return None
        try:
            return await self._try(self._read(digest))
        except asyncio.CancelledError:
            self._breaker.suspect()  # a slow server may be dead
            raise

    async def put(self, digest: str, data: bytes) -> None:
        """Keep the bytes for a week, if Redis can."""
        if len(data) > MAX_BLOB_BYTES:
            return
        async with self._writing:
            if self.is_up:
                await self._try(self._write(digest, data))

    def publish_hint(self, task_id: str) -> None:
        """Publish that the task has a new release. Return at once; the hint may be lost."""
        loop = self._loop
        if loop is not None and self.is_up:
            with contextlib.suppress(RuntimeError):  # the loop has closed meanwhile
                loop.call_soon_threadsafe(self._publish_soon, task_id)

    def _publish_soon(self, task_id: str) -> None:
        if self._loop is None or len(self._publishing) >= MAX_WAITING:
            return
        command = ("PUBLISH", CHANNEL, encode_hint(task_id))
        sending = self._connections.execute(*command, parse=_parse_count, seconds=WRITE_SECONDS)
        task = self._loop.create_task(self._try(sending))
        self._publishing.add(task)
        task.add_done_callback(self._publishing.discard)

    async def _listen(self) -> None:
        while True:
            await self._breaker.wait_closed()
            try:
                await self._connections.listen(CHANNEL, self._inbox.receive, seconds=PROBE_SECONDS)
            except Exception as error:
                _log.debug("Listening for hints failed: %s", error)
            await asyncio.sleep(_RELISTEN_SECONDS)

    async def _ping(self) -> None:
        if self._breaker.is_open:
            await self._connections.close_idle()
        await self._connections.execute("PING", parse=_parse_pong, seconds=PROBE_SECONDS)

    async def _try(self, work: Awaitable[_T]) -> _T | None:
        """Return the result, or None where Redis failed; report either to the breaker."""
        try:
            result = await work
        except ResponseError as error:
            # Out of memory, no permission, a key of another type: Redis works, and other commands may.
            self._complain(str(error))
            return None
        except Exception as error:  # redis-py's parser lets any of Python's errors through
            _log.debug("Redis failed: %s: %s", type(error).__name__, error)
            self._breaker.failed()
            return None
        self._breaker.succeeded()
        return result

    def _complain(self, complaint: str) -> None:
        """Log a complaint of Redis once."""
        if complaint != self._complaint:
            _log.warning("Redis refuses a command: %s", complaint)
            self._complaint = complaint

    async def _read(self, digest: str) -> bytes | None:
        first = await self._read_part(KEY_PREFIX + digest, _HEADER_BYTES + CHUNK_BYTES, _parse_first)
        if first is None:
            return None
        total, data = first
        chunks = [data]
        for index, begin in enumerate(range(CHUNK_BYTES, total, CHUNK_BYTES), start=1):
            parse = functools.partial(_parse_chunk, size=min(CHUNK_BYTES, total - begin))
            chunk = await self._read_part(f"{KEY_PREFIX}{digest}:{index}", CHUNK_BYTES, parse)
            if chunk is None:
                return None  # evicted, as may happen to any key
            chunks.append(chunk)
        return data if len(chunks) == 1 else b"".join(chunks)

    async def _read_part(self, key: str, limit: int, parse: Callable[[Any], _T]) -> _T:
        """Read with GETRANGE, not GET: no more than a byte over `limit` is sent, however large the value."""
        return await self._connections.execute("GETRANGE", key, 0, limit, parse=parse, seconds=READ_SECONDS)

    async def _write(self, digest: str, data: bytes) -> None:
        view = memoryview(data)
        for index, begin in enumerate(range(CHUNK_BYTES, len(data), CHUNK_BYTES), start=1):
            await self._write_part(f"{KEY_PREFIX}{digest}:{index}", view[begin : begin + CHUNK_BYTES])
        header = len(data).to_bytes(_HEADER_BYTES, "little")
        await self._write_part(KEY_PREFIX + digest, header + view[:CHUNK_BYTES])

    async def _write_part(self, key: str, value: bytes | memoryview) -> None:
        command = ("SET", key, value, "EX", TTL_SECONDS)
        await self._connections.execute(*command, parse=_parse_ok, seconds=WRITE_SECONDS)


def _parse_first(reply: Any) -> tuple[int, bytes] | None:
    """Return the total length and the first chunk, or None where there is no such key."""
    if reply == b"":
        return None
    if not isinstance(reply, bytes) or len(reply) < _HEADER_BYTES:
        raise UnexpectedReply("not a blob")
    total = int.from_bytes(reply[:_HEADER_BYTES], "little")
    data = reply[_HEADER_BYTES:]
    if total > MAX_BLOB_BYTES or len(data) != min(total, CHUNK_BYTES):
        raise UnexpectedReply("a blob of another length than it says")
    return total, data


def _parse_chunk(reply: Any, size: int) -> bytes | None:
    if reply == b"":
        return None
    if not isinstance(reply, bytes) or len(reply) != size:
        raise UnexpectedReply("a chunk of the wrong length")
    return reply


def _parse_ok(reply: Any) -> None:
    if reply != b"OK":
        raise UnexpectedReply("not OK")


def _parse_pong(reply: Any) -> None:
    if reply != b"PONG":
        raise UnexpectedReply("not PONG")


def _parse_count(reply: Any) -> int:
    if not isinstance(reply, int):
        raise UnexpectedReply("not a number")
    return reply


def _report_crash(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("A background task of the Redis tier has died", exc_info=error)
