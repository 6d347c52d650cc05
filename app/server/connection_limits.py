"""The number of connections that open files allow, and the idle ones that are closed for new ones."""

import asyncio
import errno
import functools
import logging
import resource
import socket
import time
from dataclasses import dataclass
from typing import Any

import uvicorn

log = logging.getLogger("promptplex.api")

MOST_REFUSED = 64  # connections beyond the bound that get an answer, for which each is held a while
_MOST_FILES = 65_536  # that the process raises its limit to
_OTHER_FILES = 256  # open at once beside connections: of the store, uploads, Redis, libraries
_MOST_AT_ONCE = 2048  # connections that asyncio accepts before it looks at any of them
_IDLE_SECONDS = 1.0  # a connection that waits for less doesn't give way
_SECONDS_A_LINE = 60.0


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Bounds of connections that fit the bound of open files."""

    connections: int
    at_once: int


def limits_for(files: int, most: int) -> ConnectionLimits:
    """Return bounds of at most `most` connections, with files to spare for those that come and go."""
    at_once = max(1, min(_MOST_AT_ONCE, files // 16))
    left = files - min(_OTHER_FILES, files // 2) - 3 * at_once
    return ConnectionLimits(max(1, min(most, max(left - MOST_REFUSED, left // 2))), at_once)


def raise_open_files() -> int:
    """Raise this process's limit of open files as far as it may, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return _MOST_FILES if soft == resource.RLIM_INFINITY else soft


class IdleConnections:
    """The idle connections of a server, the longest idle first. Belongs to its event loop."""

    def __init__(self) -> None:
        self._since: dict[asyncio.Transport, float] = {}
        self._line = Seldom()

    def add(self, connection: asyncio.Transport) -> None:
        """Note that a connection is idle: it may be closed for a new one."""
        self._since.pop(connection, None)
        self._since[connection] = time.monotonic()

    def discard(self, connection: asyncio.Transport) -> None:
        """Note that a connection has a request, or is lost."""
        self._since.pop(connection, None)

    def make_room(self) -> bool:
        """Close the longest idle connection and return True; False where none has been idle for long."""
        self._line.say("there are too many connections: those that wait longest give way, others get a 503")
        oldest = next(iter(self._since.items()), None)
        if oldest is None or time.monotonic() - oldest[1] < _IDLE_SECONDS:
            return False
        self.discard(oldest[0])
        oldest[0].close()
        return True


class Seldom:
    """A warning that is logged at most once a minute."""

    def __init__(self) -> None:
        self._next = 0.0

    def say(self, line: str) -> None:
        """Log the warning, unless one was logged within the last minute."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _SECONDS_A_LINE
            log.warning("%s", line)


class QuietServer(uvicorn.Server):
    """uvicorn's server, without asyncio's traceback for each connection that no file is left for."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, with a longer queue in the kernel than asyncio accepts at once."""
        asyncio.get_running_loop().set_exception_handler(functools.partial(_on_error, Seldom()))
        await super().startup(sockets)
        for listening in (each for server in self.servers for each in server.sockets):
            with socket.fromfd(listening.fileno(), listening.family, listening.type) as same:
                same.listen(socket.SOMAXCONN)


def _on_error(line: Seldom, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    error = context.get("exception")
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        line.say("no file is left for another connection; raise the limit of open files (ulimit -n)")
    else:
        loop.default_exception_handler(context)
