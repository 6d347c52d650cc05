"""The one thread that owns all engine state: inbox in, steps to the executor, outputs to the router.

While a step runs on the device, the loop takes messages, delivers the last step's outputs and plans ahead, or
launches the next one. Then it waits for the step and applies its result. It blocks on its inbox when there is
nothing to do and never polls. No lock is held while the device works.
"""

import logging
import queue
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Executor as Workers
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

from app.engine.deadlines import Deadlines
from app.engine.executor import Executor
from app.engine.isolation import Refusals, request_error, run_apart, works
from app.engine.memory.exhaustion import forget_step
from app.engine.plan import Plan, StepResult
from app.engine.prefixes import Prefix, prefix_keys, segment_slots
from app.engine.router import OutputRouter, is_last
from app.engine.sampling.token_masks import AsyncTokenMask, GrammarSource
from app.engine.scheduler import Scheduler
from app.engine.sequence import Phase, Sequence
from app.engine.statistics import Finished, StepRecorder
from app.engine.step import Step
from app.errors import (
    Cancelled,
    DeadlineExceeded,
    EngineStopped,
    PromptplexError,
    PromptRejected,
    RequestFailed,
)
from app.prompt import ModelGeometry, Prompt, PromptKind, PromptSource
from app.request import Request
from app.sites import Embedding, Site

_log = logging.getLogger("promptplex.engine")


@dataclass(frozen=True, slots=True)
class Submit:
    """Inbox: a new request, and when it came (time.monotonic)."""

    request: Request
    arrived: float


@dataclass(frozen=True, slots=True)
class Cancel:
    """Inbox: the caller has left this request."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Release:
    """Inbox: nothing will continue this request."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """Inbox: a prompt that a parked sequence waits for is here, or failed to come."""

    sequence: Sequence
    result: "Future[Prompt]"


@dataclass(frozen=True, slots=True)
class Stop:
    """Inbox: end the thread; requests that still run end with an error."""


Message = Submit | Cancel | Release | Loaded | Stop


@dataclass(frozen=True, slots=True)
class UnderWay:
    """A step that the executor has."""

    step: Step
    plan: Plan
    began: float  # time.monotonic()
    follows: bool  # it was begun as soon as the one before had ended, or earlier


class EngineLoop:
    """Turns messages into steps until it is stopped."""

    def __init__(
        self,
        *,
        geometry: ModelGeometry,
        source: PromptSource,
        scheduler: Scheduler,
        executor: Executor,
        router: OutputRouter,
        recorder: StepRecorder,
        inbox: "queue.SimpleQueue[Message]",
        grammars: GrammarSource | None,
        workers: Workers,
    ) -> None:
        """Wire the loop; `workers` compute the masks of constrained rows."""
        self._geometry = geometry
        self._source = source
        self._scheduler = scheduler
        self._executor = executor
        self._router = router
        self._recorder = recorder
        self._inbox = inbox
        self._grammars = grammars
        self._workers = workers
        self._open: dict[str, Sequence] = {}
        self._deadlines = Deadlines()
        self._refusals = Refusals()
        self._stopping = False
        self._idle = False  # no step is possible until a message or a deadline comes
        self._under_way: deque[UnderWay] = deque()
        self._applied = 0.0  # when the last step was: time.monotonic()

    def run(self) -> None:
        """Run until Stop. An exception means that the engine is dead; the caller ends all open requests."""
        while True:
            self._take_messages()
            if self._stopping:
                break
            self._expire()
            self._advance()
            if not self._under_way:
                self._rest()
        for sequence in list(self._open.values()):
            self._end(
                sequence, EngineStopped("the server stopped before the request finished; send it again")
            )

    # -- messages ---------------------------------------------------------------------------

    def _take_messages(self) -> None:
        for message in self._messages():
            match message:
                case Submit(request, arrived):
                    self._accept(request, arrived)
                case Cancel(request_id):
                    sequence = self._open.get(request_id)
                    if sequence is not None:
                        self._end(sequence, Cancelled("the request was cancelled"), is_done=True)
                case Release(request_id):
                    self._release(request_id)
                case Loaded(sequence, result):
                    self._receive_prompt(sequence, result)
                case Stop():
                    self._stopping = True

    def _messages(self) -> Iterable[Message]:
        """Yield all messages that are there; wait for the first one when no step is possible."""
        if self._idle:
            self._idle = False
            try:
                yield self._inbox.get(timeout=self._deadlines.seconds_left(time.monotonic()))
            except queue.Empty:
                return
        while True:
            try:
                yield self._inbox.get_nowait()
            except queue.Empty:
                return

    def _release(self, request_id: str) -> None:
        self._scheduler.residency.held.drop(request_id)
        if request_id in self._open:
            self._open[request_id].is_held = False

    def _accept(self, request: Request, arrived: float) -> None:
        if request.continues is not None:
            request = self._scheduler.residency.aligned(request)
        sequence = Sequence(request, prefix_keys(request, self._geometry), arrived=arrived)
        refusal = self._refusals.get(sequence.prefix_keys, time.monotonic())
        if refusal is not None:
            self._router.deliver([(request.id, refusal)])
            return
        if request.grammar is not None:
            assert self._grammars is not None, "the front refuses what can't be constrained"
            sequence.constraint = AsyncTokenMask(self._grammars, request.grammar, self._workers)
        self._open[request.id] = sequence
        self._deadlines.add(sequence)
        self._scheduler.add(sequence)
        self._load_prompts()

    def _load_prompts(self) -> None:
        """Start fetching the prompts of parked sequences; it never blocks. What comes is a message."""
        for sequence in self._scheduler.take_loads():
            for digest in sorted(sequence.awaited):
                try:
                    future = self._source.load(digest)
                except Exception as error:
                    future = Future()
                    future.set_exception(error)
                future.add_done_callback(partial(self._hand_in, sequence))

    def _hand_in(self, sequence: Sequence, result: "Future[Prompt]") -> None:
        self._inbox.put(Loaded(sequence, result))

    def _receive_prompt(self, sequence: Sequence, result: "Future[Prompt]") -> None:
        if sequence.phase is not Phase.LOADING:  # it ended while its prompt was under way
            return
        error = result.exception()
        if error is not None:
            self._end(sequence, _lost(error))
            return
        prompt = result.result()
        for place, length in _expected_lengths(sequence.request, prompt):
            if prompt.length(place) != length:
                mismatch = PromptRejected(
                    f"the stored prompt differs at {place} from the task's manifest",
                    expected=f"{length} virtual tokens",
                    found=f"{prompt.length(place)}",
                )
                self._end(sequence, mismatch)
                return
        self._scheduler.loaded(sequence, prompt)

    def _expire(self) -> None:
        for sequence in self._deadlines.expired(time.monotonic()):
            late = DeadlineExceeded(
                f"the deadline passed after {sequence.num_generated} generated tokens; allow more time, "
                "or ask for fewer tokens"
            )
            self._end(sequence, late)
        self._deadlines.clean(len(self._open))

    # -- steps ------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Launch the next step: at once, or when the oldest under way has ended; deliver while it runs."""
        finished = None
        if not (self._scheduler.may_go_ahead and self._launch()) and self._under_way:
            finished = self._settle()
            self._launch(follows=True)
        if finished is not None:
            self._report(finished)

    def _launch(self, *, follows: bool = False) -> bool:
        """Begin the next step; return whether there is one."""
        began = time.monotonic()
        step = self._scheduler.schedule()
        plan = step.plan()
        if not plan.is_empty:
            self._executor.launch(plan)
            self._under_way.append(UnderWay(step, plan, began, follows or bool(self._under_way)))
        self._load_prompts()
        return not plan.is_empty

    def _settle(self) -> Finished:
        """Wait for the oldest step under way and apply what came of it."""
        under_way = self._under_way.popleft()
        step = under_way.step
        if not self._under_way:
            self._scheduler.plan_ahead(step)
        result = self._collect(step, under_way.plan)
        now = time.monotonic()
        outputs = self._scheduler.update(step, result, now)
        for sequence, output in outputs:
            if is_last(output):
                del self._open[sequence.request.id]
        waited = self._executor.waited if under_way.follows else 0.0
        began, self._applied = max(under_way.began, self._applied), now
        return Finished(step, outputs, now - began, waited)

    def _report(self, finished: Finished) -> None:
        """Deliver a step's outputs and count it."""
        self._router.deliver([(sequence.request.id, output) for sequence, output in finished.outputs])
        self._recorder.step(finished)

    def _collect(self, step: Step, plan: Plan) -> StepResult:
        """Return a step's result. Where it fails, those at fault end with an error, and the others run."""
        try:
            return self._executor.collect(partial(step.late_inputs, plan))
        except Exception as error:
            if self._under_way or plan.follows:
                self._start_over(step, plan, error)
                return StepResult()
            result, failures = run_apart(partial(self._run_part, step), plan, error)
        step.note_failures(plan, failures)
        for id_, cause in failures.items():
            self._end_at_fault(step.owners[id_], cause)
        return result

    def _start_over(self, step: Step, plan: Plan, error: Exception) -> None:
        """Undo a step that failed and the one behind it. What they held runs again, in steps of its own."""
        while self._under_way:
            self._under_way.popleft()
            try:
                self._executor.collect(dict)
            except Exception as other:  # the first one tells more
                forget_step(other)
        _log.error("a step failed beside another one; both are run again", exc_info=error)
        forget_step(error)
        if not works(partial(self._run_part, step), plan):
            raise error
        self._scheduler.start_over(step)

    def _run_part(self, step: Step, part: Plan) -> StepResult:
        return self._executor.run(part, partial(step.late_inputs, part))

    def _end_at_fault(self, owner: Sequence | Prefix, cause: Exception) -> None:
        error = request_error(owner, cause)
        if isinstance(owner, Prefix):
            self._give_up(owner, error)
        elif owner.phase is not Phase.FINISHED:
            self._end(owner, error)
        else:  # it was cancelled meanwhile
            self._scheduler.residency.held.drop(owner.request.id)

    def _give_up(self, prefix: Prefix, error: PromptplexError) -> None:
        """End all that stand on a prefix, or wait for it, and the prefix with them."""
        self._scheduler.residency.prefixes.discard(prefix)
        self._scheduler.residency.held.drop_on(prefix.key)
        self._refusals.add(prefix.key, error, time.monotonic())
        for sequence in [each for each in self._open.values() if prefix.key in each.prefix_keys]:
            self._end(sequence, error)

    def _end(self, sequence: Sequence, error: PromptplexError, *, is_done: bool = False) -> None:
        """End a sequence outside a step; of one that `is_done`, what is to be held stays."""
        self._scheduler.finish(sequence, is_done=is_done)
        del self._open[sequence.request.id]
        self._router.deliver([(sequence.request.id, error)])

    def _rest(self) -> None:
        """Wait for a message. Where nothing is open, prove first that nothing was lost."""
        if self._open:
            assert not self._scheduler.running, "a running sequence must make progress"
            assert self._scheduler.loading, "a waiting sequence must fit when nothing runs"
        else:
            self._scheduler.check_integrity()
            self._scheduler.waiting.reset()
            self._deadlines.clean(0)
            self._executor.rest()
        self._recorder.refresh()
        self._idle = True


def _expected_lengths(request: Request, prompt: Prompt) -> Iterable[tuple[Embedding | Site, int]]:
    """Yield how many virtual tokens a request expects of a prompt at each place where it uses it.

    What is kept for other requests with other sources can only be keys and values.
    """
    source = request.source
    for segment in request.segments:
        if segment.prompt_digest == prompt.digest:
            if prompt.kind is PromptKind.SOFT and (source is None or not segment.is_kept):
                yield Embedding.DECODER, segment.num_virtual_tokens
            else:
                yield from segment_slots(segment).items()
    if source is not None and source.prompt_digest == prompt.digest:
        yield Embedding.ENCODER, source.num_virtual_tokens


def _lost(error: BaseException) -> PromptplexError:
    """Return what the caller may see of the reason for which a prompt didn't come."""
    if isinstance(error, PromptplexError):
        return error
    _log.error("a prompt could not be loaded", exc_info=error)
    return RequestFailed("the task's prompt could not be loaded; the server's log says why")
