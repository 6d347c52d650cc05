"""Redis through redis-py, within our bounds: of time for each command, and of the number of connections.

redis-py closes a connection on which a command fails or is cancelled, so that the next command can't read its
reply. A reply that doesn't fit its command is for us to see; then all idle connections are closed.
"""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

from redis.asyncio.client import Redis
from redis.asyncio.connection import Connection, ConnectionPool, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from app.store.cache.redis_url import RedisLocation

CONNECT_SECONDS = 0.100
NUM_CONNECTIONS = 8  # for commands; the listener has one more

_Reply = TypeVar("_Reply")


class UnexpectedReply(Exception):
    """A reply of a kind that Redis never gives to the command."""


class RedisConnections:
    """A client and its pool. Belongs to one event loop."""

    def __init__(self, location: RedisLocation) -> None:
        self._sentinel = _sentinel(location) if location.sentinels else None
        self._pool = _pool(location, self._sentinel)
        self._client = Redis(connection_pool=self._pool)
        self._client.response_callbacks.clear()  # replies as they come
        self._slots = asyncio.Semaphore(NUM_CONNECTIONS)

    async def execute(
        self, *command: str | bytes | int | memoryview, parse: Callable[[Any], _Reply], seconds: float
    ) -> _Reply:
        """Send a command and return its parsed reply; `parse` raises UnexpectedReply where it can't be one.

        `seconds` bounds all of it, connecting included, but not the wait for a free connection.
        Raise ResponseError where Redis refuses the command; any other exception is a failure.
        """
        async with self._slots, asyncio.timeout(seconds):
            try:
                reply = await self._client.execute_command(*command)  # type: ignore[no-untyped-call]  # redis-py's own
                return parse(reply)
            except UnexpectedReply:
                await self.close_idle()
                raise

    async def listen(self, channel: str, receive: Callable[[bytes], None], *, seconds: float) -> None:
        """Pass every payload of a channel to `receive`, on a connection of its own, until it breaks.

        Raise when it breaks, or where there is no subscription within `seconds`.
        """
        async with self._client.pubsub() as subscriber:
            messages = subscriber.listen()
            async with asyncio.timeout(seconds):
                await subscriber.subscribe(channel)
                await anext(messages)
            async for message in messages:
                if message["type"] == "message":
                    receive(message["data"])

    async def close_idle(self) -> None:
        """Close the connections that no command uses now: after a failure they may be dead too."""
        with contextlib.suppress(RedisError, OSError):
            await self._pool.disconnect(inuse_connections=False)

    async def close(self) -> None:
        """Close all connections."""
        clients: list[ConnectionPool | Redis] = [self._pool]
        if self._sentinel is not None:
            clients += self._sentinel.sentinels
        for client in clients:
            with contextlib.suppress(RedisError, OSError):
                await client.aclose()


def _pool(location: RedisLocation, sentinel: Sentinel | None) -> ConnectionPool:
    """Make a pool without redis-py's own timeouts and pauses between retries, which would add to ours."""
    options: dict[str, Any] = {
        "username": location.username,
        "password": location.password,
        "db": location.db,
        "max_connections": NUM_CONNECTIONS + 1,
        "socket_timeout": None,  # `execute` bounds each command as a whole
        "socket_connect_timeout": CONNECT_SECONDS,
        "retry": Retry(NoBackoff(), 1),  # a connection may have died in the pool, as when Redis restarts
        "protocol": 2,  # RESP 3 costs a round trip more for each connection and gives us nothing
    }
    if sentinel is not None:
        return SentinelConnectionPool(location.master, sentinel, **options)  # type: ignore[no-untyped-call]  # redis-py's own
    if location.socket_path is not None:
        return ConnectionPool(UnixDomainSocketConnection, path=location.socket_path, **options)
    assert location.address is not None
    host, port = location.address
    return ConnectionPool(SSLConnection if location.tls else Connection, host=host, port=port, **options)


def _sentinel(location: RedisLocation) -> Sentinel:
    options = {
        "socket_timeout": CONNECT_SECONDS,
        "socket_connect_timeout": CONNECT_SECONDS,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
    }
    return Sentinel(location.sentinels, sentinel_kwargs=options)  # type: ignore[no-untyped-call]  # redis-py's own
