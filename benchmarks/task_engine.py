"""An engine over registered tasks, and what a run on it took and did."""

import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from app.engine.engine import Engine, EngineConfig
from app.engine.statistics import StepStats
from app.models.decoder_only import DecoderOnly
from benchmarks.completions import submit
from benchmarks.other_load import OtherLoad
from benchmarks.registered_tasks import RegisteredTasks
from benchmarks.work import Ask

_SECONDS = 600.0  # no request takes as long; a hanging one must end


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one run took and did."""

    seconds: float
    latencies: list[float]  # of each request, in seconds
    num_tokens: int  # generated
    prefix_hits: int
    prefix_misses: int
    prefix_tokens: int  # taken through the model to compile prompts
    other_tokens: int  # taken through the model for all else
    mean_residents: float  # prefixes on the device, over the steps
    other_load: float  # share of the CPUs that other processes had

    @property
    def rate(self) -> float:
        """Generated tokens per second."""
        return self.num_tokens / self.seconds


class RunningEngine:
    """An engine over the registered tasks, for the length of a block."""

    def __init__(
        self, backbone: DecoderOnly, tasks: RegisteredTasks, max_rows: int, kv_cache_bytes: int
    ) -> None:
        self._tasks = tasks
        self._max_rows = max_rows
        self._steps: list[StepStats] = []
        config = EngineConfig(max_rows=max_rows, kv_cache_bytes=kv_cache_bytes)
        self._engine = Engine(backbone, tasks.source, config, on_step=self._steps.append)

    def __enter__(self) -> "RunningEngine":
        self._engine.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.stop()

    def run(self, asks: Sequence[Ask], lengths: Sequence[int], clients: int) -> Run:
        """Each client asks again as soon as it is answered; with as many as asks, all ask at once.

        `lengths` are the new tokens of each ask.
        """
        self._steps.clear()
        began = time.perf_counter()
        with OtherLoad() as others, ThreadPoolExecutor(clients) as pool:
            latencies = list(pool.map(self._serve, asks, lengths))
        steps = list(self._steps)
        return Run(
            seconds=time.perf_counter() - began,
            latencies=latencies,
            num_tokens=sum(lengths),
            prefix_hits=sum(step.prefix_hits for step in steps),
            prefix_misses=sum(step.prefix_misses for step in steps),
            prefix_tokens=sum(step.num_prefix_tokens for step in steps),
            other_tokens=sum(step.num_prefill_tokens + step.num_decode_rows for step in steps),
            mean_residents=statistics.fmean(step.resident_prefixes for step in steps),
            other_load=others.share,
        )

    def make_resident(self, tasks: Sequence[int]) -> None:
        """Ask for them; where not all fit, about the last ones stay."""
        lengths = [2] * len(tasks)  # when the second token comes, the step of the first one is counted
        self.run([Ask(task, (1,)) for task in tasks], lengths, self._max_rows)

    def absent_tasks(self) -> list[int]:
        """Tasks whose prompts aren't on the device."""
        return self._tasks.outside(self._engine.stats().resident_digests)

    def reload_seconds(self, ask: Ask) -> float:
        """How much later a lone request's first token comes where its prompt must be compiled first."""
        compiled, resident = (self._serve(ask, 1) for _ in range(2))
        return compiled - resident

    def _serve(self, ask: Ask, new_tokens: int) -> float:
        began = time.perf_counter()
        submit(self._engine, self._tasks.request(ask, new_tokens)).result(_SECONDS)
        return time.perf_counter() - began
