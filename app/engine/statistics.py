"""Statistics: numbers of each step, and a snapshot that any thread may read."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from app.engine.client import EngineStats, LiveRow
from app.engine.router import Output
from app.engine.scheduler import Scheduler
from app.engine.sequence import Sequence
from app.engine.step import Step


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """What one step did; handed to the engine's `on_step` on the engine thread."""

    duration: float
    device_wait: float  # seconds that the device waited for the step since it ended the one before
    num_decode_rows: int
    num_beam_rows: int  # of those that decode
    num_copied_blocks: int  # for beams, and sequences that continue others, that had shared them
    num_reused_tokens: int  # of prompts, that weren't computed since their sequences continue others
    num_prefill_tokens: int
    num_prefix_tokens: int
    num_sources: int  # encoded in this step
    num_encoder_tokens: int  # their rows and tokens
    num_distinct_tasks: int
    num_running: int
    num_waiting: int
    num_preempted: int
    num_speculated_tokens: int  # guesses that were run
    num_accepted_tokens: int  # that came since guesses were right, without a step of their own
    kv_usage: float
    resident_prefixes: int
    resident_prefix_bytes: int
    prefix_hits: int
    prefix_misses: int
    new_tokens: int
    first_token_latencies: Collection[float]
    inter_token_latencies: Collection[float]


@dataclass(frozen=True, slots=True)
class Finished:
    """A step whose result was applied."""

    step: Step
    outputs: list[tuple[Sequence, Output]]
    seconds: float  # since the step before was applied, or since it was scheduled
    device_wait: float


class StepRecorder:
    """Keeps the snapshot, and reports every step to `on_step`."""

    def __init__(self, scheduler: Scheduler, on_step: Callable[[StepStats], None] | None) -> None:
        self.snapshot = EngineStats()  # replaced whole, so that readers need no lock
        self._scheduler = scheduler
        self._on_step = on_step
        self._num_steps = 0
        # Shared with the thread of one watcher, without a lock: it sets the flag, and the engine's thread
        # answers with its next step. At worst an answer is lost, and the flag set again.
        self._rows: tuple[LiveRow, ...] | None = None
        self._rows_are_asked_for = False

    def take_rows(self) -> tuple[LiveRow, ...] | None:
        """Return the rows of a step since the last call, None where there was none; order the next."""
        rows, self._rows = self._rows, None
        self._rows_are_asked_for = True
        return rows

    def refresh(self) -> None:
        """Replace the snapshot by the scheduler's state."""
        scheduler, residency = self._scheduler, self._scheduler.residency
        prefixes, blocks = residency.prefixes, residency.blocks
        self.snapshot = EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting) + len(scheduler.loading),
            kv_usage=blocks.usage,
            resident_prefixes=len(prefixes),
            resident_prefix_bytes=int(prefixes.num_blocks @ blocks.block_bytes),
            resident_digests=prefixes.resident_digests(),
            kv_cache_bytes=blocks.num_bytes,
            kv_bytes_per_token=blocks.bytes_per_token,
            kv_blocks=int(blocks.capacity.sum()),
            kv_free_blocks=int(blocks.num_free.sum()),
            kv_evictable_blocks=int(prefixes.num_idle_blocks.sum()),
            unfilled_prefix_slots=prefixes.num_unfilled_slots,
            unfilled_request_slots=sum(-len(row.tokens) % blocks.block_size for row in scheduler.running),
            num_sources=len(residency.sources),
            num_held=len(residency.held),
            steps=self._num_steps,
        )

    def step(self, finished: Finished) -> None:
        """Report a step."""
        step = finished.step
        self._num_steps += 1
        self.refresh()
        if self._rows_are_asked_for:
            self._rows_are_asked_for = False
            self._rows = _rows_of(step, self._scheduler.running)
        if self._on_step is None:
            return
        now, counts = self.snapshot, step.counts
        firsts, others = counts.first_token_latencies, counts.inter_token_latencies
        self._on_step(
            StepStats(
                duration=finished.seconds,
                device_wait=finished.device_wait,
                num_decode_rows=counts.decode_rows,
                num_beam_rows=counts.beam_rows,
                num_copied_blocks=counts.copied_blocks,
                num_reused_tokens=counts.reused_tokens,
                num_prefill_tokens=counts.prefill_tokens,
                num_prefix_tokens=counts.prefix_tokens,
                num_sources=counts.sources,
                num_encoder_tokens=counts.encoder_tokens,
                num_distinct_tasks=len({sequence.request.task for sequence in step.sequences.values()}),
                num_running=now.num_running,
                num_waiting=now.num_waiting,
                num_preempted=counts.preempted,
                num_speculated_tokens=counts.speculated,
                num_accepted_tokens=counts.accepted,
                kv_usage=now.kv_usage,
                resident_prefixes=now.resident_prefixes,
                resident_prefix_bytes=now.resident_prefix_bytes,
                prefix_hits=counts.prefix_hits,
                prefix_misses=counts.prefix_misses,
                new_tokens=len(firsts) + len(others) + counts.searched_tokens,
                first_token_latencies=firsts,
                inter_token_latencies=others,
            )
        )


def _rows_of(step: Step, running: Collection[Sequence]) -> tuple[LiveRow, ...]:
    """Return the sequences of a step, those that ended with it included, and all others that run.

    A request in beam search has one row.
    """
    encoding = {source.input.id for source in step.sources.values()}
    return tuple(
        LiveRow(
            each.request.id,
            each.request.task,
            each.request.task_version,
            each.num_generated < 2,
            each.num_generated,
            *_source_of(each, encoding),
        )
        for each in dict.fromkeys(row.leader for row in [*running, *step.sequences.values()])
    )


def _source_of(sequence: Sequence, encoding: Collection[str]) -> tuple[int, bool]:
    """Return the length of a sequence's source, and whether it is among those that a step encoded."""
    source = sequence.request.source
    return (0, False) if source is None else (source.num_slots, source.id in encoding)
