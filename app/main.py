"""The assembly: from settings to store, base, engine, services and HTTP app.

It knows no process and no HTTP server. `asgi_app` is for any ASGI host: its lifespan loads the base,
serves, and closes. `promptplex serve` runs the same `Replica` in a process of its own (`app/server/`).
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TypeVar

import torch
from fastapi import FastAPI
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from app.api.app import Lifespan, create_app
from app.api.auth.authenticator import public
from app.api.middleware.access_log import note_outcome
from app.api.middleware.tracing import tracer_from_environment
from app.api.state import ApiConfig, ServerState, Services
from app.console.pages import console_router
from app.engine.engine import Engine
from app.errors import Unavailable, UnsupportedModel
from app.keys.keyring import Keyring
from app.metrics import Metrics
from app.models.loading import LoadedBase, load_base
from app.request import Outcome
from app.serving.base_defaults import BaseDefaults, reported_defaults
from app.serving.generation import GenerationService
from app.serving.publishing.import_watcher import ImportWatcher
from app.serving.publishing.publisher import PublishingService
from app.serving.store_maintenance import StoreMaintenance
from app.serving.structured_output.grammars import Grammars
from app.serving.training_runs.command import train_command
from app.serving.training_runs.process import ProcessLimits
from app.serving.training_runs.service import TrainingConfig, TrainingRuns
from app.settings import Settings, load_settings
from app.store.cache.prompt_cache import PromptCache
from app.store.cache.redis_tier import RedisTier
from app.store.prompt_store import PromptStore, open_store

_T = TypeVar("_T")

log = logging.getLogger("promptplex")

_FETCH_SECONDS = 60  # for a prompt from any tier, by the store's maintenance


def asgi_app(settings: Settings | None = None) -> FastAPI:
    """Return an ASGI app that loads the base when its host starts it, and closes with it.

    Without `settings` they come from the environment, so that a host can call it by name:
    `uvicorn --factory app.main:asgi_app`. The host's startup ends when the base is loaded, and fails where
    it can't be served. When the engine dies, `/health/ready` answers 503 until the host starts another.
    """
    return Replica(settings or load_settings({})).app


class Replica:
    """One copy of the service, in whichever process hosts it: its settings, keys, state and app."""

    def __init__(self, settings: Settings, *, lifespan: Lifespan | None = None) -> None:
        """`lifespan` replaces the one that loads before the host's startup ends.

        Raises KeyFileError for keys that can't be read, ValueError where the demo is wanted and isn't here.
        """
        _check_demo(settings)
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self.settings = settings
        self.state = ServerState()
        self.config = ApiConfig(
            max_body_bytes=settings.max_body_bytes,
            max_upload_bytes=settings.max_upload_bytes,
            allowed_hosts=settings.host_allow_list,
            allowed_origins=settings.allowed_origins,
        )
        self._keys = _keyring(settings)
        self._loader: threading.Thread | None = None
        self._watcher: asyncio.Task[None] | None = None
        self.app = create_app(
            self.state,
            self.config,
            keys=self._keys,
            lifespan=lifespan or self._lifespan,
            tracer=tracer_from_environment(),
        )
        if settings.console:
            self.app.include_router(console_router(public))

    @property
    def is_busy(self) -> bool:
        """Whether the base still loads, or the engine still runs."""
        loading = self._loader is not None and self._loader.is_alive()
        return loading or (self.state.services is not None and self.state.services.engine.is_alive)

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        await self.load()
        try:
            yield
        finally:
            await self.close()

    async def load(self) -> "asyncio.Future[BaseException]":
        """Load, then serve; return a future that gets the engine's error if it ever dies.

        Raises UnsupportedModel, ValueError and OSError where the base can't be served.
        """
        loop = asyncio.get_running_loop()
        death: asyncio.Future[BaseException] = loop.create_future()

        def on_failure(error: BaseException) -> None:
            log.critical("the engine died", exc_info=error)
            _settle(loop, death, error)

        services = await self._assemble_on_thread(on_failure)
        services.maintenance.start()
        if self.settings.import_dir is not None:
            watching = ImportWatcher(self.settings.import_dir, services.publishing).watch()
            self._watcher = asyncio.create_task(watching)
        self.state.services = services  # requests are taken from here on
        log.info("ready: serving base model %s", self.settings.base_name)
        return death

    async def close(self) -> None:
        """End what `load` began; requests that still run end with EngineStopped."""
        if self._watcher is not None:
            self._watcher.cancel()
        if self.state.services is not None:
            await asyncio.to_thread(self.state.services.close)

    async def _assemble_on_thread(self, on_failure: Callable[[BaseException], None]) -> Services:
        """On a daemon thread, so that Ctrl-C needn't wait for a large model."""
        loop = asyncio.get_running_loop()
        loaded: asyncio.Future[Services | BaseException] = loop.create_future()

        def work() -> None:
            try:
                outcome: Services | BaseException = assemble(
                    self.settings, progress=self._progress, on_failure=on_failure, keys=self._keys
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


def _keyring(settings: Settings) -> Keyring | None:
    """Read the keys, and log how many there are. Raise KeyFileError for a file that can't be read."""
    if settings.keys_file is None:
        log.warning(
            "no API keys: any program that can connect may generate and upload (`promptplex serve` lets only "
            "this machine connect)"
        )
        return None
    keys = Keyring(settings.keys_file)
    log.info("%d keys in %s; all but the probes need one", len(keys), settings.keys_file)
    return keys


def _check_demo(settings: Settings) -> None:
    """Raise ValueError where the demo isn't a directory here, so that no model hub is asked for its name."""
    if settings.model == Settings.model_fields["model"].default and not Path(settings.model).is_dir():
        raise ValueError(
            f"there is no {settings.model} here; start in a Promptplex checkout, or name a base with --model"
        )


def assemble(
    settings: Settings,
    *,
    progress: Callable[[str], None] = log.info,
    on_failure: Callable[[BaseException], None] | None = None,
    keys: Keyring | None = None,
) -> Services:
    """Load and wire everything below the HTTP edge; the engine runs when this returns.

    `progress` gets a line for each stage; `on_failure` is called, on the engine's thread, when the
    engine dies; `keys` are charged for the tokens that they use. Raises UnsupportedModel when the base
    can't be served; nothing that was begun is left behind then.
    """
    with contextlib.ExitStack() as undo:
        services = _assemble(settings, progress, on_failure, keys, undo)
        undo.pop_all()
        return services


def _assemble(
    settings: Settings,
    progress: Callable[[str], None],
    on_failure: Callable[[BaseException], None] | None,
    keys: Keyring | None,
    undo: contextlib.ExitStack,
) -> Services:
    store, metrics = open_store(settings.store), Metrics()
    undo.callback(_read_ahead(store).join)  # while the base loads
    base = _load_base(settings, progress)
    redis = _redis_tier(settings, lambda task_id: source.prefetch_released(store.history(task_id)))
    source = PromptCache(store, host_bytes=settings.host_cache_bytes, remote=redis)
    undo.callback(source.close)
    tokenizer = _fast(base.tokenizer)
    grammars = Grammars(tokenizer, eos_ids=base.eos_ids, vocab_size=base.backbone.geometry.vocab_size)
    engine = Engine(
        base.backbone,
        source,
        settings.engine_config(),
        grammars=grammars,
        on_step=metrics.on_step,
        on_failure=on_failure,
        progress=progress,
    )
    undo.callback(engine.stop)
    metrics.watch(engine.stats, source.stats, redis, engine.device_memory)
    generation = GenerationService(
        engine,
        store,
        tokenizer,
        eos_ids=base.eos_ids,
        grammars=grammars,
        defaults=_defaults(settings, base, engine.max_rows),
        decoder_start_id=base.decoder_start_id,
        base_name=settings.base_name,
        timeout=settings.request_timeout,
        prefetch=source.prefetch,
        on_outcome=_on_outcome(metrics, keys),
        on_program=metrics.on_program,
    )
    undo.callback(generation.close)
    publishing = _publishing(store, generation, source, redis)
    engine.start()
    return Services(
        engine=engine,
        store=store,
        source=source,
        generation=generation,
        publishing=publishing,
        metrics=metrics,
        maintenance=StoreMaintenance(store, lambda digest: _fetch(source, digest), generation.compatibility),
        redis=(lambda: "off") if redis is None else redis.state,
        training=_training(settings, publishing),
        device=str(base.backbone.device),
        probe=str(base.report),
    )


def _read_ahead(store: PromptStore) -> threading.Thread:
    reading = threading.Thread(target=store.read_ahead, name="read-ahead", daemon=True)
    reading.start()
    return reading


def _defaults(settings: Settings, base: LoadedBase, max_rows: int) -> BaseDefaults:
    given = base.generation if settings.generation_config == "auto" else {}
    return reported_defaults(given, max_rows=max_rows)


def _load_base(settings: Settings, progress: Callable[[str], None]) -> LoadedBase:
    return load_base(
        settings.model,
        dtype=settings.dtype,
        weights=settings.weights,
        device=settings.device,
        max_context=settings.max_context,
        progress=progress,
    )


def _on_outcome(metrics: Metrics, keys: Keyring | None) -> Callable[[Outcome], None]:
    """Return what every ended generation is passed to: metrics, its request's log line, its key's quota."""

    def on_outcome(outcome: Outcome) -> None:
        if not outcome.is_trial:
            metrics.on_outcome(outcome)
        note_outcome(outcome)
        is_free = outcome.reason in ("error", "refused")  # nothing was made, or the server failed at it
        if keys is not None and not is_free:
            keys.charge(outcome.tenant, outcome.prompt_tokens + outcome.generated_tokens)

    return on_outcome


def _redis_tier(settings: Settings, on_hint: Callable[[str], None]) -> RedisTier | None:
    url = settings.redis_url
    return None if url is None else RedisTier(url.get_secret_value(), on_hint=on_hint)


def _fetch(source: PromptCache, digest: str) -> bytes:
    """Return a prompt's bytes from any tier. Raise Unavailable when they take too long."""
    try:
        return source.load(digest).result(_FETCH_SECONDS).data
    except TimeoutError:
        raise Unavailable(f"Prompt {digest} did not come in time") from None


def _publishing(
    store: PromptStore, generation: GenerationService, source: PromptCache, redis: RedisTier | None
) -> PublishingService:
    """Prompts go into the tiers at once, hints of releases to other replicas."""
    more = {} if redis is None else {"on_release": redis.publish_hint}
    return PublishingService(store, generation, on_stored=source.offer, **more)


def _training(settings: Settings, publishing: PublishingService) -> TrainingRuns | None:
    """Runs train on the base that is served, and lie beside the store's own files."""
    if not settings.training:
        return None
    limits = ProcessLimits(
        threads=settings.training_threads,
        memory_bytes=settings.training_memory_bytes,
        device=settings.training_device,
    )
    config = TrainingConfig(directory=settings.store / "training-runs", limits=limits)
    names = {"model", "dtype", "max_context", "generation_config", "store"}
    base = settings.model_dump(include=names) | {"device": settings.training_device}
    return TrainingRuns(publishing, config, train_command(base))


def _fast(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerFast:
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UnsupportedModel("this base has no fast tokenizer (tokenizer.json), which serving needs")
    return tokenizer


def _settle(loop: asyncio.AbstractEventLoop, future: "asyncio.Future[_T]", outcome: _T) -> None:
    """Set a future's result from another thread."""

    def settle() -> None:
        if not future.done():
            future.set_result(outcome)

    # The loop is closed already when the server was stopped while it loaded.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(settle)
