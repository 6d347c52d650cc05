"""The engine in this process: an EngineClient over a loop, which runs on a thread of its own."""

import asyncio
import logging
import math
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from app.concurrency import Workers
from app.engine.admissibility import check_beams, check_segments, check_source, check_tokens
from app.engine.blocks import KVBlocks
from app.engine.client import EngineStats, LiveRow
from app.engine.executor import Executor
from app.engine.graphs.capture import CudaCapture
from app.engine.graphs.decode_graphs import bucket_sizes
from app.engine.loop import Cancel, EngineLoop, Message, Release, Stop, Submit
from app.engine.memory.device import DeviceMemory, device_memory
from app.engine.memory.kv_memory import in_words, kv_blocks, kv_cache_bytes
from app.engine.router import OutputRouter, Port
from app.engine.runner import Runner
from app.engine.sampling.token_masks import NUM_WORKERS, GrammarSource
from app.engine.scheduler import Scheduler, SchedulerConfig
from app.engine.statistics import StepRecorder, StepStats
from app.errors import EngineStopped, InvalidRequest, Overloaded, PromptplexError
from app.models.attention.kv_cache import TRASH_SLOT, KVCache
from app.models.backbone import Backbone
from app.prompt import ModelGeometry, PromptSource
from app.request import Request, TokenDelta

_log = logging.getLogger("promptplex.engine")


def steps_in_flight_on(device: torch.device) -> int:
    """Return how many steps a device has at once, at most, unless the configuration says it."""
    return 2 if device.type == "cuda" else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Bounds of the engine."""

    max_rows: int = 64  # sequences that run at once
    token_budget: int = 2048  # tokens of one forward pass
    block_size: int = 16  # K/V slots of one block
    kv_cache_bytes: int | None = None  # None: what a GPU's steps leave, a share of a CPU's free memory
    gpu_memory_utilization: float = 0.9  # share of a GPU's memory that all of this may take
    max_queue: int = 1024  # accepted requests that wait beyond those that run
    speculate: int = 0  # tokens that are guessed at once for a row, at most; 0: none
    cuda_graphs: bool = True  # decode steps of a GPU run by graphs
    # Steps that are launched before the first of them has ended, at most. None: 2 on a GPU, 1 on a CPU, where
    # the next step is no work for the device but for the cores that the one before needs.
    steps_in_flight: int | None = None

    def bounds(self, device: torch.device) -> SchedulerConfig:
        """Return those of a step. Raise ValueError where they contradict each other."""
        return SchedulerConfig(
            max_rows=self.max_rows,
            token_budget=self.token_budget,
            speculate=self.speculate,
            steps_in_flight=self.steps_in_flight or steps_in_flight_on(device),
        )

    @property
    def num_graphs(self) -> int:
        """Row counts to record on a GPU; none where block 0 has no slot for padding rows to write to."""
        return len(bucket_sizes(self.max_rows)) if self.cuda_graphs and self.block_size > TRASH_SLOT else 0


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
        progress: Callable[[str], None] = _log.info,
    ) -> None:
        """Allocate the K/V memory and wire the parts; `start` starts the threads.

        Raise ValueError where memory doesn't hold it (memory.kv_cache_bytes).

        `on_step` runs on the engine's thread and must be cheap; `on_failure` when it dies. Without
        `grammars`, constrained requests are refused. `progress` gets lines for the operator.
        """
        blocks, runner = _prepared(backbone, config, progress)
        self._config = config
        self._grammars = grammars
        self._workers = Workers(NUM_WORKERS, "grammar")
        self.backbone = backbone
        self._router = OutputRouter()
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._scheduler = Scheduler(blocks, config.bounds(backbone.device))
        self._recorder = StepRecorder(self._scheduler, on_step)
        self._executor = Executor(runner)
        self._loop = EngineLoop(
            geometry=backbone.geometry,
            source=source,
            scheduler=self._scheduler,
            executor=self._executor,
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
        """Start the thread that owns all state, and the device's."""
        _log.info("K/V cache: %s", in_words(self._scheduler.residency.blocks, self.device_memory()))
        self._executor.start()
        self._thread.start()
        self._accepting = True

    def drain(self, timeout: float) -> bool:
        """Refuse new requests and wait for the open ones; return whether all ended in `timeout` seconds."""
        self._accepting = False
        return self._router.wait_until_empty(timeout)

    def stop(self) -> None:
        """End the threads; requests that still run end with EngineStopped."""
        self._accepting = False
        self._inbox.put(Stop())
        if self._thread.is_alive():
            self._thread.join()
        self._executor.stop()
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
        """The exception that ended the loop, if one did."""
        return self._failure

    @property
    def max_rows(self) -> int:
        """Sequences that run at once, at most."""
        return self._config.max_rows

    @property
    def max_open(self) -> int:
        """Requests that run or wait, at most."""
        return self._config.max_rows + self._config.max_queue

    @property
    def geometry(self) -> ModelGeometry:
        """The base model's shapes and bounds."""
        return self.backbone.geometry

    def own_tensor(self, name: str) -> Tensor | None:
        """Return the base's own embedding `[V, ...]` that a checkpoint calls `name`; None: it has none."""
        return self.backbone.own_tensor(name)

    def stats(self) -> EngineStats:
        """Return a snapshot."""
        return self._recorder.snapshot

    def device_memory(self) -> DeviceMemory:
        """Read the memory of the device now."""
        return device_memory(self.backbone.device)

    def take_rows(self) -> tuple[LiveRow, ...] | None:
        """Return the rows of one step since the last call, None where there was none; for one watcher."""
        return self._recorder.take_rows()

    # -- requests ---------------------------------------------------------------------------

    def check_admissible(self, request: Request) -> None:
        """Refuse what could never run: raise RequestTooLong or InvalidRequest (EngineClient says when)."""
        if not request.token_ids or request.max_new_tokens < 0:
            raise InvalidRequest("a request needs at least one prompt token, and 0 or more new ones")
        if not 0 <= request.num_scored < len(request.token_ids):
            raise InvalidRequest("every scored token needs a token before it")
        check_beams(request, self.max_rows)
        check_segments(request, self.geometry)
        check_source(request, self.geometry)
        if request.deadline is not None and not math.isfinite(request.deadline):
            raise InvalidRequest("a deadline is a finite time, or None")
        if request.grammar is not None and self._grammars is None:
            raise InvalidRequest("this engine can't constrain its answers; leave the grammar out")
        check_tokens(request, self.geometry)
        self._scheduler.residency.check_fits(request)

    async def generate(self, request: Request) -> AsyncGenerator[TokenDelta, None]:
        """Yield the request's deltas; the last one carries `finish`. Raise what EngineClient names."""
        port = Port(asyncio.get_running_loop())
        self._admit(request, port)
        is_open = True
        try:
            while is_open:
                output = await port.get()
                if isinstance(output, PromptplexError):
                    is_open = False
                    raise output
                is_open = output.finish is None
                yield output
        finally:
            if is_open:
                self.cancel(request.id)

    async def collect(self, request: Request, into: list[TokenDelta]) -> None:
        """Add the request's deltas to `into`, all at its end. Raise what `generate` raises."""
        port = Port(asyncio.get_running_loop(), is_whole=True)
        self._admit(request, port)
        try:
            await port.woken()
        except BaseException:
            self.cancel(request.id)
            raise
        finally:
            outputs = list(port.take_all())
            into += (each for each in outputs if not isinstance(each, PromptplexError))
        if isinstance(outputs[-1], PromptplexError):
            raise outputs[-1]

    def cancel(self, request_id: str) -> None:
        """End a request, which raises Cancelled; what it holds is free within two steps (EngineClient)."""
        self._inbox.put(Cancel(request_id))

    def release(self, request_id: str) -> None:
        """Give back what stayed of an `is_held` request, or will: it is free within two steps."""
        self._inbox.put(Release(request_id))

    def _admit(self, request: Request, port: Port) -> None:
        if not self.is_accepting:
            raise EngineStopped("the server takes no requests now (loading, draining or failed); try later")
        self.check_admissible(request)
        if len(self._router) >= self.max_open:
            raise Overloaded(f"{self.max_open} requests are running or waiting already; try again shortly")
        self._router.open(request.id, port)
        self._inbox.put(Submit(request, time.monotonic()))
        if self._has_ended:  # the thread may have ended all others before this one came
            self._fail_open_requests("the engine was stopped")

    # -- the thread -------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._loop.run()
        except BaseException as failure:  # whatever it is, no caller may wait for ever
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
        self._router.deliver((request_id, error) for request_id in self._router.open_requests())


def _prepared(
    backbone: Backbone, config: EngineConfig, progress: Callable[[str], None]
) -> tuple[KVBlocks, Runner]:
    """Allocate the K/V memory, and record decode steps where there are graphs."""
    blocks = kv_blocks(
        backbone,
        block_size=config.block_size,
        kv_cache_bytes=kv_cache_bytes(
            backbone,
            config.bounds(backbone.device),
            utilization=config.gpu_memory_utilization,
            num_graphs=config.num_graphs,
            asked=config.kv_cache_bytes,
        ),
        max_rows=config.max_rows,
        token_budget=config.token_budget,
    )
    cache = KVCache(
        backbone.kv_groups,
        [(1 + count) * config.block_size for count in blocks.capacity.tolist()],
        dtype=backbone.dtype,
        device=backbone.device,
        pools=[group.pool for group in blocks.groups],
    )
    runner = Runner(backbone, cache)
    if backbone.device.type == "cuda" and config.num_graphs:
        capture = CudaCapture(backbone.device)
        runner.record_graphs(max_rows=config.max_rows, capture=capture, progress=progress)
    return blocks, runner
