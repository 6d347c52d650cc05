"""The composition root: settings -> store, base, engine, services, HTTP app; then one process.

The port opens at once: `/health/live` answers, and `/health/ready` says 503 while the base model
loads on a thread. Ctrl-C or SIGTERM drains: not ready, no new work, running requests finish, exit
status 0. A base that can't be served, or an engine that dies, ends the process with status 1.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TypeVar

import torch
from fastapi import FastAPI
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from app.api.app import create_app
from app.api.auth.authenticator import public
from app.api.middleware.access_log import note_outcome
from app.api.middleware.connections import raise_open_files, server_config
from app.api.middleware.crowd import QuietServer, room_for_connections
from app.api.middleware.tracing import tracer_from_environment
from app.api.state import MAX_CONNECTIONS, ApiConfig, ServerState, Services
from app.concurrency import Workers
from app.console.pages import console_router
from app.engine.engine import Engine
from app.errors import PromptplexError, Unavailable, UnsupportedModel
from app.keys.keyring import Keyring
from app.logs import take_over_libraries
from app.metrics import Metrics
from app.models.loading import LoadedBase, load_base
from app.serving.base_defaults import reported_defaults
from app.serving.generation import GenerationService
from app.serving.generation_request import Outcome
from app.serving.publishing.import_watcher import ImportWatcher
from app.serving.publishing.publisher import PublishingService
from app.serving.store_maintenance import StoreMaintenance
from app.serving.structured_output.grammars import Grammars
from app.settings import Settings
from app.store.cache.prompt_cache import PromptCache
from app.store.cache.redis_tier import RedisTier
from app.store.prompt_store import PromptStore, open_store

_T = TypeVar("_T")

log = logging.getLogger("promptplex")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_FETCH_SECONDS = 60  # for a prompt from any tier, by the upkeep
_LINGER_SECONDS = 0.25  # between the port's closing and that of connections without a request
_CONNECTION_SECONDS = 10  # for answers still on their way to slow clients when everything else is done


def run_server(settings: Settings) -> int:
    """Serve until a signal or a failure; the exit status for the process."""
    _check_demo(settings)
    take_over_libraries(settings.log_format)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    server = PromptplexServer(settings)
    try:
        server.run()
    except SystemExit:  # uvicorn's way out when it can't have the port; it has logged why
        server.failed = True
    status = 1 if server.failed else 0
    if server.is_busy:
        # A thread deep in torch can't be stopped, and the interpreter would abort when it tears
        # down under it. Nothing is lost: what is acknowledged is on disk already.
        logging.shutdown()
        os._exit(status)
    return status


def _keyring(settings: Settings) -> Keyring | None:
    """The keys, told of in a line. Raises KeyFileError."""
    if settings.keys_file is None:
        log.warning(
            "no API keys: only this machine can connect, but any program on it may generate and upload"
        )
        return None
    keys = Keyring(settings.keys_file)
    log.info("%d keys in %s; all but the probes need one", len(keys), settings.keys_file)
    return keys


def _check_demo(settings: Settings) -> None:
    """The demo is a directory of the checkout; its name must never be asked of a model hub."""
    if settings.model == Settings.model_fields["model"].default and not Path(settings.model).is_dir():
        raise ValueError(
            f"there is no {settings.model} here; start in a Promptplex checkout, or name a base with --model"
        )


def assemble(
    settings: Settings,
    *,
    progress: Callable[[str], None],
    on_failure: Callable[[BaseException], None],
    keys: Keyring | None = None,
) -> Services:
    """Load and wire everything below the HTTP edge; the engine runs when this returns.

    `progress` gets a line for each stage; `on_failure` is called, on the engine's thread, when the
    engine dies; `keys` hear of the tokens that they use. Raises UnsupportedModel when the base can't
    be served; nothing that was begun is left behind then.
    """
    with contextlib.ExitStack() as undo:
        services = _assemble(settings, progress, on_failure, keys, undo)
        undo.pop_all()
        return services


def _assemble(
    settings: Settings,
    progress: Callable[[str], None],
    on_failure: Callable[[BaseException], None],
    keys: Keyring | None,
    undo: contextlib.ExitStack,
) -> Services:
    store, metrics = open_store(settings.store), Metrics()
    reading = threading.Thread(target=store.read_ahead, name="read-ahead", daemon=True)
    reading.start()  # while the base loads
    undo.callback(reading.join)
    base = _load_base(settings, progress)
    redis = _redis_tier(settings, lambda task_id: source.prefetch_released(store.history(task_id)))
    source = PromptCache(store, host_bytes=settings.host_cache_bytes, remote=redis)
    undo.callback(source.close)
    tokenizer = _fast(base.tokenizer)
    grammars = Grammars(tokenizer, eos_ids=base.eos_ids, vocab_size=base.backbone.geometry.vocab_size)
    config, on_step = settings.engine_config(), metrics.on_step
    engine = Engine(base.backbone, source, config, grammars=grammars, on_step=on_step, on_failure=on_failure)
    undo.callback(engine.stop)
    metrics.watch(engine.stats, source.stats, redis)
    generation = GenerationService(
        engine,
        store,
        tokenizer,
        eos_ids=base.eos_ids,
        grammars=grammars,
        defaults=reported_defaults(base.generation if settings.generation_config == "auto" else {}),
        base_name=settings.base_name,
        timeout=settings.request_timeout,
        prefetch=source.prefetch,
        on_outcome=_on_outcome(metrics, keys),
    )
    undo.callback(generation.close)
    engine.start()
    return Services(
        engine=engine,
        store=store,
        source=source,
        generation=generation,
        publishing=_publishing(store, generation, source, redis),
        metrics=metrics,
        maintenance=StoreMaintenance(store, lambda digest: _fetch(source, digest), generation.compatibility),
        redis=(lambda: "off") if redis is None else redis.state,
        device=str(base.backbone.device),
        probe=str(base.report),
    )


def _load_base(settings: Settings, progress: Callable[[str], None]) -> LoadedBase:
    return load_base(
        settings.model,
        dtype=settings.dtype,
        device=settings.device,
        max_context=settings.max_context,
        progress=progress,
    )


def _on_outcome(metrics: Metrics, keys: Keyring | None) -> Callable[[Outcome], None]:
    """What hears of every generation that ended: metrics, the log's line of its request, its key's quota."""

    def told(outcome: Outcome) -> None:
        if not outcome.is_trial:
            metrics.on_outcome(outcome)
        note_outcome(outcome)
        if keys is not None and outcome.reason != "error":  # what the server failed at is free
            keys.charge(outcome.tenant, outcome.prompt_tokens + outcome.generated_tokens)

    return told


def _redis_tier(settings: Settings, on_hint: Callable[[str], None]) -> RedisTier | None:
    url = settings.redis_url
    return None if url is None else RedisTier(url.get_secret_value(), on_hint=on_hint)


def _fetch(source: PromptCache, digest: str) -> bytes:
    """A prompt's bytes from any tier, for the upkeep."""
    try:
        return source.load(digest).result(_FETCH_SECONDS).data
    except TimeoutError:
        raise Unavailable(f"Prompt {digest} did not come in time") from None


def _publishing(
    store: PromptStore, generation: GenerationService, source: PromptCache, redis: RedisTier | None
) -> PublishingService:
    """What is stored goes into the tiers at once, and other replicas hear of what is released."""
    more = {} if redis is None else {"on_release": redis.publish_hint}
    return PublishingService(store, generation, on_stored=source.offer, **more)


def _fast(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerFast:
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UnsupportedModel("this base has no fast tokenizer (tokenizer.json), which serving needs")
    return tokenizer


class PromptplexServer(QuietServer):
    """The server, which drains before it stops listening, and knows whether it failed."""

    def __init__(self, settings: Settings) -> None:
        """Raises KeyFileError where there are to be keys that can't be read."""
        self.settings = settings
        self.keys = _keyring(settings)
        self.state = ServerState()
        self.failed = False
        self._loader: threading.Thread | None = None
        self._watcher: asyncio.Task[None] | None = None
        room = room_for_connections(raise_open_files(), MAX_CONNECTIONS)
        api = ApiConfig(
            max_body_bytes=settings.max_body_bytes,
            max_upload_bytes=settings.max_upload_bytes,
            allowed_hosts=settings.host_allow_list,
            allowed_origins=settings.allowed_origins,
            max_connections=room.connections,
        )
        tracer = tracer_from_environment()
        app = create_app(self.state, api, keys=self.keys, lifespan=self._lifespan, tracer=tracer)
        if settings.console:
            app.include_router(console_router(public))
        super().__init__(
            server_config(
                app,
                api,
                host=settings.host,
                port=settings.port,
                log_level=settings.log_level,
                backlog=room.at_once,
                timeout_graceful_shutdown=_CONNECTION_SECONDS,
                lifespan="on",
            )
        )

    @property
    def is_busy(self) -> bool:
        """Whether the base still loads, or the engine still runs."""
        loading = self._loader is not None and self._loader.is_alive()
        return loading or (self.state.services is not None and self.state.services.engine.is_alive)

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        asyncio.get_running_loop().set_default_executor(Workers(8, "edge"))  # for what routes ask
        supervisor = asyncio.create_task(self._supervise())
        yield
        for task in (supervisor, self._watcher):
            if task is not None:
                task.cancel()
        if self.state.services is not None:
            await asyncio.to_thread(self.state.services.close)

    async def _supervise(self) -> None:
        """Load, then wait for the engine's death: what ends either of them ends the process."""
        loop = asyncio.get_running_loop()
        death: asyncio.Future[BaseException] = loop.create_future()
        try:
            services = await self._load(lambda error: _settle(loop, death, error))
            self.state.services = services
            log.info("ready: serving base model %s", self.settings.base_name)
            services.maintenance.start()
            if self.settings.import_dir is not None:
                watching = ImportWatcher(self.settings.import_dir, services.publishing).watch()
                self._watcher = asyncio.create_task(watching)
            log.critical("the engine died", exc_info=await death)
        except asyncio.CancelledError:  # the server ends, and not because of this
            raise
        except (PromptplexError, ValueError) as error:  # what a user can mend; it says how
            log.critical("can't serve %s: %s", self.settings.model, error)
            log.debug("the details", exc_info=True)
        except BaseException:  # a panic of native code is no Exception
            log.critical("can't serve %s", self.settings.model, exc_info=True)
        self.failed = self.should_exit = True

    async def _load(self, on_failure: Callable[[BaseException], None]) -> Services:
        """Assemble on a daemon thread, so that Ctrl-C needn't wait for a large model."""
        loop = asyncio.get_running_loop()
        loaded: asyncio.Future[Services | BaseException] = loop.create_future()

        def work() -> None:
            try:
                outcome: Services | BaseException = assemble(
                    self.settings, progress=self._progress, on_failure=on_failure, keys=self.keys
                )
            except BaseException as error:
                outcome = error
            _settle(loop, loaded, outcome)

        self._loader = threading.Thread(target=work, name="load", daemon=True)
        self._loader.start()
        outcome = await loaded
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def _progress(self, line: str) -> None:
        log.info("%s", line)
        self.state.progress = line

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
        """The first signal drains; a second one ends the process at once."""
        if self.state.draining:
            os._exit(1)  # nothing is lost: what is acknowledged is on disk already
        self.state.draining = True
        try:
            threading.Thread(target=self._drain, name="drain", daemon=True).start()
        except RuntimeError:  # no thread is to be had: what still runs gets its error with the shutdown
            self.should_exit = True

    def _drain(self) -> None:
        services = self.state.services
        if services is not None:
            seconds = self.settings.drain_timeout
            end = time.monotonic() + seconds
            log.info("draining: running requests get %g seconds; signal again to end at once", seconds)
            self.state.requests.wait_until_none(seconds)  # also those that are still being admitted
            if not services.engine.drain(max(0.0, end - time.monotonic())):
                log.warning("some requests didn't finish in time and were ended")
            services.engine.stop()  # before the connections close, so that everybody gets an answer
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Whoever still sends a body, or has just connected, gets a 503 before the connections close."""
        for server in self.servers:
            server.close()
        self.state.requests.close()
        await asyncio.sleep(_LINGER_SECONDS)
        await super().shutdown(sockets)


def _settle(loop: asyncio.AbstractEventLoop, future: "asyncio.Future[_T]", outcome: _T) -> None:
    """Set a future's result from another thread."""

    def settle() -> None:
        if not future.done():
            future.set_result(outcome)

    # The loop is closed already when the server was stopped while it loaded.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(settle)
