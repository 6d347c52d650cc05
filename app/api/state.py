"""What the routes stand on, and what the server is doing: loading, ready, draining or dead."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from fastapi import Request

from app.engine.engine import Engine
from app.errors import EngineStopped
from app.metrics import Metrics
from app.serving.catalog import Catalog
from app.serving.publishing import PublishingService
from app.serving.service import GenerationService

MIB = 1 << 20
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiConfig:
    """Bounds and allow-lists of the edge."""

    max_body_bytes: int = 4 * MIB  # any body but an upload
    max_upload_bytes: int = 64 * MIB  # all parts of an upload together
    allowed_hosts: tuple[str, ...] | None = LOOPBACK_HOSTS  # names in `Host`, any port; None: all
    allowed_origins: tuple[str, ...] = ()  # of browsers, besides the server's own


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What `/info` tells of the loaded base."""

    name: str
    device: str
    probe: str = ""  # the figures of the load-time probe, in words


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """Everything behind the routes, once the base model is loaded."""

    engine: Engine
    generation: GenerationService
    publishing: PublishingService
    catalog: Catalog
    metrics: Metrics
    model: ModelInfo
    redis: Callable[[], str] = lambda: "off"  # "up", "down" or "off"


class Phase(StrEnum):
    """Where the server is in its life."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


class ServerState:
    """Set by `app/main.py`, read by every route. Only the event loop's thread touches it."""

    def __init__(self) -> None:
        self._phase = Phase.LOADING
        self._services: Services | None = None
        self.progress = "starting"  # what loading is at, for /health

    @property
    def phase(self) -> Phase:
        """The phase; an engine that died counts whatever was said before."""
        if self._services is not None and self._phase is not Phase.DRAINING and not self._services.engine.is_alive:
            return Phase.DEAD
        return self._phase

    @property
    def loaded(self) -> Services | None:
        """The services, if the base model has been loaded."""
        return self._services

    def set_ready(self, services: Services) -> None:
        """The base model is loaded and its engine runs."""
        self._services = services
        self._phase = Phase.READY

    def set_draining(self) -> None:
        """No new work from now on; what runs may finish."""
        self._phase = Phase.DRAINING

    def set_dead(self) -> None:
        """Loading failed or the engine died."""
        self._phase = Phase.DEAD

    def services(self) -> Services:
        """The services; EngineStopped while they can't be used."""
        phase = self.phase
        if phase is Phase.READY and self._services is not None:
            return self._services
        raise EngineStopped(_WHY_NOT[phase], retry_after=5.0)


_WHY_NOT = {
    Phase.LOADING: "The base model is still loading; try again shortly.",
    Phase.DRAINING: "The server is shutting down; try another replica, or again shortly.",
    Phase.DEAD: "The engine has stopped after a failure; the server is about to exit.",
    Phase.READY: "The server is not ready.",
}


def server_state(request: Request) -> ServerState:
    """The state that `create_app` was given."""
    state: Any = request.app.state.server
    assert isinstance(state, ServerState)
    return state


def services(request: Request) -> Services:
    """The services behind a route; EngineStopped (503) while there are none."""
    return server_state(request).services()
