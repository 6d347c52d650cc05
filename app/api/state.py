"""The services behind the routes, and the server's phase: loading, ready, draining or dead."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from fastapi import Request

from app.api.middleware.inflight import InflightRequests
from app.engine.client import EngineClient
from app.errors import EngineStopped
from app.metrics import Metrics
from app.serving.catalog import Catalog
from app.serving.generation import GenerationService
from app.serving.publishing.publisher import PublishingService
from app.serving.store_maintenance import StoreMaintenance
from app.serving.training_runs.service import TrainingRuns
from app.store.cache.prompt_cache import PromptCache
from app.store.prompt_store import PromptStore

KIB = 1 << 10
MIB = 1 << 20
MAX_CONNECTIONS = 8192
PREFIX_TOKENS = 256  # of the largest prompt that an upload has room for by default
_LEAST_UPLOAD_BYTES = 64 * MIB
_OTHER_UPLOAD_BYTES = 4 * MIB  # the file's header, config, task
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiConfig:
    """Bounds and allow-lists of the edge."""

    max_body_bytes: int = 4 * MIB  # any body but an upload
    max_upload_bytes: int | None = None  # all parts of an upload together; None: by the base model
    allowed_hosts: tuple[str, ...] | None = LOOPBACK_HOSTS  # names in `Host`, any port; None: all
    allowed_origins: tuple[str, ...] = ()  # of browsers, besides the server's own
    head_seconds: float = 10.0  # for a request line and headers to come
    body_seconds: float = 30.0  # for a body, beside what its size is given
    stall_seconds: float = 30.0  # in which a client that reads an answer must take some of it
    max_head_bytes: int = 64 * KIB  # of a request line and headers
    max_headers: int = 128
    max_connections: int = MAX_CONNECTIONS


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """Everything behind the routes, once the base model is loaded."""

    engine: EngineClient
    store: PromptStore
    source: PromptCache
    generation: GenerationService
    publishing: PublishingService
    metrics: Metrics
    maintenance: StoreMaintenance
    device: str = "cpu"
    probe: str = ""  # the figures of the load-time probe, in words
    redis: Callable[[], Literal["up", "down", "off"]] = field(default=lambda: "off")
    training: TrainingRuns | None = None  # None: training over HTTP is off
    catalog: Catalog = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "catalog", Catalog(self.store, self.generation))

    def close(self) -> None:
        """End all threads of the services; requests that still run end with EngineStopped."""
        if self.training is not None:
            self.training.stop()  # its process gets some seconds to end, meanwhile
        self.maintenance.stop()
        self.engine.stop()
        self.generation.close()
        self.publishing.close()
        if self.training is not None:
            self.training.close()
        self.source.close()


class Phase(StrEnum):
    """The phase of the server's life."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


_WHY_NOT = {
    Phase.LOADING: "The base model is still loading; try again shortly.",
    Phase.DRAINING: "The server is shutting down; try another replica, or again shortly.",
    Phase.DEAD: "The engine has stopped after a failure; the server is about to exit.",
}


@dataclass(slots=True)
class ServerState:
    """Written by `app/main.py` and `app/server/` (also from signal handlers), read by every route."""

    services: Services | None = None  # None while the base model loads
    draining: bool = False
    progress: str = "starting"  # the stage of loading, for /health
    requests: InflightRequests = field(default_factory=InflightRequests)

    @property
    def phase(self) -> Phase:
        """Return the present phase."""
        if self.draining:
            return Phase.DRAINING
        if self.services is None:
            return Phase.LOADING
        return Phase.READY if self.services.engine.is_alive else Phase.DEAD

    def on_refusal(self, reason: str) -> None:
        """Count a request that authentication refused, as soon as there are metrics."""
        if self.services is not None:
            self.services.metrics.on_refusal(reason)

    def max_upload_bytes(self, configured: int | None) -> int:
        """Return what is configured, else room for a float32 prefix of `PREFIX_TOKENS` tokens of the base."""
        if configured is not None:
            return configured
        if self.services is None:
            return _LEAST_UPLOAD_BYTES
        geometry = self.services.engine.geometry
        tokens = min(PREFIX_TOKENS, geometry.max_positions)
        return max(_LEAST_UPLOAD_BYTES, geometry.prefix_bytes(tokens) + _OTHER_UPLOAD_BYTES)

    @property
    def is_shutting_down(self) -> bool:
        """Return whether the process is about to end."""
        return self.phase in (Phase.DRAINING, Phase.DEAD)

    def ready_services(self) -> Services:
        """Return the services. Raise EngineStopped (503) while they can't be used."""
        phase = self.phase
        if phase is Phase.READY and self.services is not None:
            return self.services
        raise EngineStopped(_WHY_NOT[phase], retry_after=5.0)


# Dependencies of the routes. They are coroutines, for FastAPI would run plain functions on a thread.


async def server_state(request: Request) -> ServerState:
    """Return the state that `create_app` was given."""
    state = request.app.state.server
    assert isinstance(state, ServerState)
    return state


async def services(request: Request) -> Services:
    """Return the services behind a route. Raise EngineStopped (503) while there are none."""
    return (await server_state(request)).ready_services()


async def api_config(request: Request) -> ApiConfig:
    """Return the configuration that `create_app` was given."""
    config = request.app.state.config
    assert isinstance(config, ApiConfig)
    return config
