"""What the engine tells about itself: numbers of each step, and a snapshot that anybody may read."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from app.engine.plan import FinishedRequest, Plan, StepStats
from app.engine.scheduler import Scheduler, StepCounts
from app.engine.sequence import Sequence
from app.request import TokenDelta


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """The engine's state after its last step."""

    num_running: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0  # share of K/V blocks that are held
    resident_prefixes: int = 0
    resident_prefix_bytes: int = 0
    resident_digests: frozenset[str] = frozenset()  # prompts that are ready on the device
    steps: int = 0


@dataclass(slots=True)
class _Tokens:
    new: int = 0
    first_latencies: list[float] = field(default_factory=list)
    inter_latencies: list[float] = field(default_factory=list)


class StepRecorder:
    """Collects what happens between two steps and reports it with the second."""

    def __init__(
        self, scheduler: Scheduler, bytes_per_slot: int, on_step: Callable[[StepStats], None] | None
    ) -> None:
        self.snapshot = EngineStats()  # replaced whole, so that readers need no lock
        self._scheduler = scheduler
        self._bytes_per_slot = bytes_per_slot
        self._on_step = on_step
        self._tokens = _Tokens()
        self._finished: deque[FinishedRequest] = deque()

    def token(self, sequence: Sequence, now: float, previous: float | None) -> None:
        """A sequence got a token; `previous` is when it got the one before."""
        self._tokens.new += 1
        if previous is None:
            self._tokens.first_latencies.append(now - sequence.arrived)
        else:
            self._tokens.inter_latencies.append(now - previous)

    def finished(self, sequence: Sequence, delta: TokenDelta, reason: str) -> None:
        """A sequence ended."""
        first = sequence.first_token
        self._finished.append(
            FinishedRequest(
                task=sequence.request.task,
                reason=reason,
                prompt_tokens=len(sequence.request.resident_ids) + len(sequence.request.token_ids),
                generated_tokens=sequence.num_generated,
                timings=delta.timings or sequence.timings(time.monotonic()),
                time_to_first_token=None if first is None else first - sequence.arrived,
            )
        )

    def step(self, plan: Plan, duration: float) -> None:
        """Report a step, and everything that ended since the last one."""
        owners = [item.owner for item in plan.items]
        tasks = {owner.request.task for owner in owners if isinstance(owner, Sequence)}
        self.refresh(steps=self.snapshot.steps + 1)
        now, counts = self.snapshot, self._scheduler.counts
        self._report(
            StepStats(
                duration=duration,
                num_decode_rows=counts.decode_rows,
                num_prefill_tokens=counts.prefill_tokens,
                num_prefix_tokens=counts.prefix_tokens,
                num_distinct_tasks=len(tasks),
                num_running=now.num_running,
                num_waiting=now.num_waiting,
                num_preempted=counts.preempted,
                kv_usage=now.kv_usage,
                resident_prefixes=now.resident_prefixes,
                resident_prefix_bytes=now.resident_prefix_bytes,
                prefix_hits=counts.prefix_hits,
                prefix_misses=counts.prefix_misses,
                new_tokens=self._tokens.new,
                finished=tuple(self._finished),
                first_token_latencies=tuple(self._tokens.first_latencies),
                inter_token_latencies=tuple(self._tokens.inter_latencies),
            )
        )

    def refresh(self, *, steps: int | None = None) -> None:
        """Replace the snapshot by the scheduler's state."""
        scheduler = self._scheduler
        self.snapshot = EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting) + len(scheduler.loading),
            kv_usage=scheduler.blocks.usage,
            resident_prefixes=len(scheduler.prefixes),
            resident_prefix_bytes=scheduler.prefixes.num_slots * self._bytes_per_slot,
            resident_digests=scheduler.prefixes.resident_digests(),
            steps=self.snapshot.steps if steps is None else steps,
        )

    def idle(self) -> None:
        """Nothing is open any more; reports requests that ended since the last step."""
        self._scheduler.counts = StepCounts()
        steps = self.snapshot.steps
        if self._finished:
            self.step(Plan(writes=(), items=()), 0.0)
        self.refresh(steps=steps)

    def _report(self, stats: StepStats) -> None:
        self._tokens = _Tokens()
        self._finished.clear()
        if self._on_step is not None:
            self._on_step(stats)
