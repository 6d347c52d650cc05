"""The engine's front: submit requests from any thread or event loop, get tokens back."""

import asyncio
import math
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass

from app.concurrency import Workers
from app.engine.blocks import KVBlocks
from app.engine.loop import Cancel, EngineLoop, Message, Stop, Submit
from app.engine.memory import num_blocks_for
from app.engine.plan import StepStats
from app.engine.router import Completion, FuturePort, OutputRouter, Port, StreamPort
from app.engine.runner import Runner
from app.engine.sampling.token_masks import NUM_WORKERS, GrammarSource
from app.engine.scheduler import Scheduler, SchedulerConfig
from app.engine.statistics import EngineStats, LiveRow, StepRecorder
from app.errors import EngineStopped, InvalidRequest, Overloaded, PromptplexError, RequestTooLong
from app.models.attention.kv_cache import KVCache
from app.models.backbone import Backbone
from app.prompt import ModelGeometry, PromptSource
from app.request import Request, TokenDelta


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Bounds of the engine."""

    max_rows: int = 64  # sequences that run at once
    token_budget: int = 2048  # tokens of one forward pass
    block_size: int = 16  # K/V slots of one block
    kv_cache_bytes: int | None = None  # None: a share of the free memory
    max_queue: int = 1024  # accepted requests that wait beyond those that run


class Engine:
    """Continuous batching over one base model. Token ids in, token ids out."""

    def __init__(
        self,
        backbone: Backbone,
        source: PromptSource,
        config: EngineConfig,
        *,
        grammars: GrammarSource | None = None,
        on_step: Callable[[StepStats], None] | None = None,
        on_failure: Callable[[BaseException], None] | None = None,
    ) -> None:
        """`on_step` runs on the engine's thread and must be cheap; `on_failure` when it dies.

        Without `grammars`, constrained requests are refused.
        """
        num_blocks = num_blocks_for(backbone, config.block_size, config.kv_cache_bytes, config.max_rows)
        blocks = KVBlocks(num_blocks, config.block_size)
        cache = KVCache(
            backbone.kv_groups,
            [count * config.block_size for count in num_blocks],
            dtype=backbone.dtype,
            device=backbone.device,
        )
        self._config = config
        self._grammars = grammars
        self._workers = Workers(NUM_WORKERS, "grammar")
        self.backbone = backbone
        self._router = OutputRouter()
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._scheduler = Scheduler(
            blocks,
            SchedulerConfig(max_rows=config.max_rows, token_budget=config.token_budget),
        )
        bytes_per_slot = sum(group.bytes_per_slot(backbone.dtype) for group in backbone.kv_groups)
        self._recorder = StepRecorder(self._scheduler, bytes_per_slot, on_step)
        self._loop = EngineLoop(
            geometry=backbone.geometry,
            source=source,
            scheduler=self._scheduler,
            runner=Runner(backbone, cache),
            router=self._router,
            recorder=self._recorder,
            inbox=self._inbox,
            grammars=grammars,
            workers=self._workers,
        )
        self._on_failure = on_failure
        self._failure: BaseException | None = None
        self._has_ended = False
        self._accepting = False
        self._thread = threading.Thread(target=self._run, name="promptplex-engine", daemon=True)

    # -- life -------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread that owns all state."""
        self._thread.start()
        self._accepting = True

    def drain(self, timeout: float) -> bool:
        """Refuse new work and wait for what runs; whether all of it ended in time."""
        self._accepting = False
        return self._router.wait_until_empty(timeout)

    def stop(self) -> None:
        """End the thread; requests that still run end with EngineStopped."""
        self._accepting = False
        self._inbox.put(Stop())
        if self._thread.is_alive():
            self._thread.join()
        self._workers.shutdown(cancel_futures=True)

    @property
    def is_alive(self) -> bool:
        """Whether the loop runs and has not died."""
        return self._thread.is_alive() and not self._has_ended

    @property
    def is_accepting(self) -> bool:
        """Whether new requests are taken: started, neither draining nor dead."""
        return self._accepting and self.is_alive

    @property
    def failure(self) -> BaseException | None:
        """What the loop died of."""
        return self._failure

    @property
    def max_open(self) -> int:
        """Requests that run or wait, at most."""
        return self._config.max_rows + self._config.max_queue

    @property
    def geometry(self) -> ModelGeometry:
        return self.backbone.geometry

    def stats(self) -> EngineStats:
        """A snapshot; safe from any thread."""
        return self._recorder.snapshot

    def take_rows(self) -> tuple[LiveRow, ...] | None:
        """For one watcher: the rows of a step since its last call, None where there was none.

        Rows are put down only once for each call, so watching costs a step nothing measurable.
        """
        return self._recorder.take_rows()

    @property
    def max_rows(self) -> int:
        """Sequences that run at once."""
        return self._config.max_rows

    # -- requests ---------------------------------------------------------------------------

    def check_admissible(self, request: Request) -> None:
        """Refuse what could never run.

        Raises:
            RequestTooLong: beyond the position limit, or K/V memory even when alone.
            InvalidRequest: no tokens, ids outside the vocabulary, a negative number of new tokens, a prompt
                without virtual tokens or the other way round, a deadline that is no time, or a grammar
                where there is nothing to follow it.
        """
        if not request.token_ids or request.max_new_tokens < 0:
            raise InvalidRequest("a request needs at least one prompt token, and 0 or more new ones")
        if not 0 <= request.num_scored < len(request.token_ids):
            raise InvalidRequest("every scored token needs a token before it")
        if (request.prompt_digest is None) != (request.num_virtual_tokens == 0):
            raise InvalidRequest("a prompt and its virtual tokens come together or not at all")
        if request.deadline is not None and not math.isfinite(request.deadline):
            raise InvalidRequest("a deadline is a finite time, or None")
        if request.grammar is not None and self._grammars is None:
            raise InvalidRequest("this engine can't constrain its answers; leave the grammar out")
        ids = (*request.resident_ids, *request.token_ids, *(id_ for id_, _ in request.sampling.logit_bias))
        if min(ids) < 0 or max(ids) >= self.geometry.vocab_size:
            raise InvalidRequest(f"token ids must be from 0 to {self.geometry.vocab_size - 1}")
        prompt = len(request.resident_ids) + len(request.token_ids)
        total = request.num_virtual_tokens + prompt + request.max_new_tokens
        if total > self.geometry.max_positions:
            raise RequestTooLong(
                f"{request.num_virtual_tokens} virtual + {prompt} prompt + {request.max_new_tokens} new "
                f"tokens = {total}, but the model has {self.geometry.max_positions} positions; shorten the "
                "input, ask for fewer new tokens, or set 'truncate'",
                param="max_new_tokens",
            )
        self._scheduler.check_fits(request)

    async def generate(self, request: Request) -> AsyncIterator[TokenDelta]:
        """Yield the request's deltas; the last one carries `finish` or `error`.

        Leaving the iterator early cancels the request.

        Raises:
            RequestTooLong, InvalidRequest, Overloaded, EngineStopped: before anything is queued.
        """
        port = StreamPort(asyncio.get_running_loop())
        self._admit(request, port)
        delta: TokenDelta | None = None
        try:
            while delta is None or not delta.is_last:
                delta = await port.queue.get()
                yield delta
        finally:
            if delta is None or not delta.is_last:
                self.cancel(request.id)

    def submit(self, request: Request) -> "Future[Completion]":
        """For synchronous callers: the future holds the Completion or the typed error."""
        port = FuturePort()
        self._admit(request, port)
        return port.future

    def cancel(self, request_id: str) -> None:
        """End a request; everything it holds is free within two steps."""
        self._inbox.put(Cancel(request_id))

    def _admit(self, request: Request, port: Port) -> None:
        if not self.is_accepting:
            raise EngineStopped("the server takes no requests now (loading, draining or failed); try later")
        self.check_admissible(request)
        if len(self._router) >= self.max_open:
            raise Overloaded(f"{self.max_open} requests are running or waiting already; try again shortly")
        self._router.open(request.id, port)
        self._inbox.put(Submit(request, time.monotonic()))
        if self._has_ended:  # the thread may have told everybody before this one came
            self._fail_open_requests("the engine was stopped")

    # -- the thread -------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._loop.run()
        except BaseException as failure:  # whatever it is, nobody may wait for ever
            self._failure = failure
            self._has_ended = True
            try:
                self._fail_open_requests("the engine failed; its log says why")
            finally:
                if self._on_failure is not None:
                    self._on_failure(failure)
        else:
            self._has_ended = True
            self._fail_open_requests("the engine was stopped")

    def _fail_open_requests(self, message: str) -> None:
        error: PromptplexError = EngineStopped(message)
        self._accepting = False
        self._router.deliver(
            TokenDelta(request_id=request_id, error=error) for request_id in self._router.open_requests()
        )
