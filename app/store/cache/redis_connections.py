"""Connections to Redis: one command at a time on each, within bounded time, and no reply unchecked.

What goes wrong on a connection closes it, a cancelled command too: the next one must never read
an answer that was meant for another.
"""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakSet

from redis.asyncio.client import Redis
from redis.asyncio.connection import (
    AbstractConnection,
    Connection,
    ConnectionPool,
    SSLConnection,
    UnixDomainSocketConnection,
)
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError

from app.store.cache.redis_url import RedisLocation

CONNECT_SECONDS = 0.100
NUM_CONNECTIONS = 8  # for commands; the listener has one more

_Reply = TypeVar("_Reply")


class OddReply(Exception):
    """The server answered with something that no such command is answered with."""


class RedisConnections:
    """A pool of connections. Lives on one event loop."""

    def __init__(self, location: RedisLocation) -> None:
        self._sentinel = _sentinel(location) if location.sentinels else None
        self._pool = _pool(location, self._sentinel)
        self._slots = asyncio.Semaphore(NUM_CONNECTIONS)
        self._proven: WeakSet[AbstractConnection] = WeakSet()  # have answered a command before

    async def ask(
        self, *command: str | bytes | int | memoryview, parse: Callable[[Any], _Reply], seconds: float
    ) -> _Reply:
        """Send a command and parse its reply; `parse` raises OddReply where it can't be one.

        `seconds` bounds all of it, connecting included, but not the wait for a free connection.
        Raises ResponseError where Redis refuses the command; any other exception is a failure.
        """
        async with self._slots, asyncio.timeout(seconds):
            try:
                return await self._exchange(command, parse)
            except _PooledConnectionBroke:
                return await self._exchange(command, parse)

    async def listen(self, channel: str, receive: Callable[[bytes], None], *, seconds: float) -> None:
        """Hand every payload of a channel to `receive`, on a connection of its own, until it breaks.

        Raises when it breaks, or where there is no subscription within `seconds`.
        """
        async with asyncio.timeout(seconds):
            connection = await self._acquire()
        try:
            async with asyncio.timeout(seconds):
                await connection.send_command("SUBSCRIBE", channel)
                _check_subscribed(await connection.read_response())
            while True:
                match await connection.read_response():
                    case [b"message", bytes(), bytes(payload)]:
                        receive(payload)
                    case _:
                        raise OddReply("not a message")
        finally:
            await self._drop(connection)
            await self._pool.release(connection)

    async def close_idle(self) -> None:
        """Close the connections that nobody uses now: after a failure they may be dead too."""
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

    async def _exchange(self, command: tuple[Any, ...], parse: Callable[[Any], _Reply]) -> _Reply:
        connection = await self._acquire()
        was_proven = connection in self._proven
        try:
            await connection.send_command(*command)
            reply = parse(await connection.read_response())
            self._proven.add(connection)
            return reply
        except ResponseError:  # a proper answer; the connection is in order
            raise
        except BaseException as error:
            await self._drop(connection)
            if was_proven and isinstance(error, RedisConnectionError):
                raise _PooledConnectionBroke from error
            raise
        finally:
            await self._pool.release(connection)

    async def _acquire(self) -> AbstractConnection:
        connection: AbstractConnection = await self._pool.get_connection()  # type: ignore[no-untyped-call]  # redis-py's own
        return connection

    async def _drop(self, connection: AbstractConnection) -> None:
        self._proven.discard(connection)
        with contextlib.suppress(RedisError, OSError):
            await connection.disconnect(nowait=True)


class _PooledConnectionBroke(Exception):
    """A connection that had worked before broke, as when the server restarted: worth one more try."""


def _check_subscribed(reply: object) -> None:
    match reply:
        case [b"subscribe", bytes(), int()]:
            return
    raise OddReply("not a subscription")


def _pool(location: RedisLocation, sentinel: Sentinel | None) -> ConnectionPool:
    """All bounds are ours: without our timeouts and retries redis-py would add its own."""
    options: dict[str, Any] = {
        "username": location.username,
        "password": location.password,
        "db": location.db,
        "max_connections": NUM_CONNECTIONS + 1,
        "socket_timeout": None,  # `ask` bounds each command as a whole
        "socket_connect_timeout": CONNECT_SECONDS,
        "retry": Retry(NoBackoff(), 0),
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
