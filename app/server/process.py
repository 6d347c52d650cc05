"""One server process.

The port opens at once: `/health/live` answers, and `/health/ready` answers 503 while the base model loads
on a thread. Ctrl-C or SIGTERM drains: the server isn't ready, takes no new work, lets running requests
finish, and exits with status 0. A base that can't be served, or an engine that dies, ends the process with
status 1.
"""

import asyncio
import contextlib
import dataclasses
import functools
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from types import FrameType
from typing import Any

from fastapi import FastAPI

from app.api.state import MAX_CONNECTIONS
from app.concurrency import Workers
from app.errors import PromptplexError
from app.logs import take_over_libraries
from app.main import Replica
from app.server.connection_limits import QuietServer, limits_for, raise_open_files
from app.server.connections import server_config
from app.settings import Settings

log = logging.getLogger("promptplex")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_LINGER_SECONDS = 0.25  # between the port's closing and that of connections without a request
_CONNECTION_SECONDS = 10  # for answers still on their way to slow clients when everything else is done


def run_server(settings: Settings) -> int:
    """Serve until a signal or a failure; return the exit status of the process."""
    take_over_libraries(settings.log_format)
    server = PromptplexServer(settings)
    try:
        server.run()
    except SystemExit:  # raised by uvicorn, which has logged why, where the port can't be opened
        server.failed = True
    status = 1 if server.failed else 0
    if server.replica.is_busy:
        # A thread deep in torch can't be stopped, and the interpreter would abort when it tears
        # down under it. Nothing is lost: what is acknowledged is on disk already.
        logging.shutdown()
        os._exit(status)
    return status


class PromptplexServer(QuietServer):
    """A server that drains before it stops listening, and knows whether it failed."""

    def __init__(self, settings: Settings) -> None:
        """Raise as `Replica` does."""
        self.replica = Replica(settings, lifespan=self._lifespan)
        self.state = self.replica.state
        self.failed = False
        limits = limits_for(raise_open_files(), MAX_CONNECTIONS)
        super().__init__(
            server_config(
                self.replica.app,
                dataclasses.replace(self.replica.config, max_connections=limits.connections),
                host=settings.host,
                port=settings.port,
                log_level=settings.log_level,
                backlog=limits.at_once,
                timeout_graceful_shutdown=_CONNECTION_SECONDS,
                lifespan="on",
            )
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        asyncio.get_running_loop().set_default_executor(Workers(8, "edge"))  # for routes' blocking calls
        supervisor = asyncio.create_task(self._supervise())
        yield
        supervisor.cancel()
        await self.replica.close()

    async def _supervise(self) -> None:
        """Load, then wait for the engine's death; either one's failure ends the process."""
        try:
            death = await self.replica.load()
            await death
        except asyncio.CancelledError:  # the server ends, and not because of this
            raise
        except (PromptplexError, ValueError) as error:  # a user can mend it; the message says how
            log.critical("can't serve %s: %s", self.replica.settings.model, error)
            log.debug("the details", exc_info=True)
        except BaseException:  # a panic of native code is no Exception
            log.critical("can't serve %s", self.replica.settings.model, exc_info=True)
        self.failed = self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but a drained server ends with status 0 instead of by the signal."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal; end the process at once at the second."""
        if self.state.draining:
            os._exit(1)  # nothing is lost: what is acknowledged is on disk already
        self.state.draining = True
        try:
            threading.Thread(target=self._drain, name="drain", daemon=True).start()
        except RuntimeError:  # the system gives no thread: what still runs gets its error with the shutdown
            self.should_exit = True

    def _drain(self) -> None:
        services = self.state.services
        if services is not None:
            seconds = self.replica.settings.drain_timeout
            end = time.monotonic() + seconds
            log.info("draining: running requests get %g seconds; signal again to end at once", seconds)
            if services.training is not None:
                services.training.stop()
            self.state.requests.wait_until_none(seconds)  # also those that are still being admitted
            if not services.engine.drain(max(0.0, end - time.monotonic())):
                log.warning("some requests didn't finish in time and were ended")
            services.engine.stop()  # before the connections close, so that every request gets an answer
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening; answer 503 where a body still comes or a client has just connected; then close."""
        await self._stop_listening()
        self.state.requests.close()
        await asyncio.sleep(_LINGER_SECONDS)
        await super().shutdown(sockets)

    async def _stop_listening(self) -> None:
        """Close the ports, and serve who has connected: the kernel would reset what isn't accepted yet."""
        loop = asyncio.get_running_loop()
        protocol: Any = self.config.http_protocol_class
        connection = functools.partial(
            protocol,
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
        )
        for server in self.servers:
            # Without descriptors of their own: there may be none left.
            ports = [socket.socket(fileno=each.fileno()) for each in server.sockets]
            for each in server.sockets:
                loop.remove_reader(each.fileno())
            await asyncio.sleep(0)  # what asyncio has accepted joins the server while that is open
            late = [client for port in ports for client in _accepted(port)]
            for port in ports:
                port.detach()
            server.close()
            for client in late:
                await loop.connect_accepted_socket(connection, client)


def _accepted(port: socket.socket) -> Iterator[socket.socket]:
    """Accept all clients of a port that have connected."""
    with contextlib.suppress(OSError):  # there is none left, or no file for one
        while True:
            yield port.accept()[0]
