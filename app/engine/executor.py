"""The executor: runs Plans in order, on the one thread that does all of the engine's torch work.

Between `launch` and `collect` the caller is free to do what the step's outcome doesn't change. Since Plans
run in order, slots that are given back meanwhile can be handed out again: a later Plan writes them after
this one's reads and writes.
"""

import queue
import threading
import time
from collections.abc import Mapping

from app.engine.plan import Plan, StepResult
from app.engine.runner import Launched, Masks, Runner
from app.engine.sampling.token_masks import PackedMask
from app.models.cpu.openmp import release_workers

_REST = Plan(writes=(), items=())  # stands for no plan: the thread rests


class Executor:
    """One Plan at a time is under way. Called by one thread."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._plans: queue.SimpleQueue[Plan | None] = queue.SimpleQueue()
        self._masks: queue.SimpleQueue[Mapping[int, PackedMask]] = queue.SimpleQueue()
        # What came of a plan; None where its forward pass has ended, and masks are to be given.
        self._outcomes: queue.SimpleQueue[Launched | BaseException | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="promptplex-device", daemon=True)
        self.waited = 0.0  # seconds between the end of the last plan but one and the begin of the last

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the plan under way, whose outcome is dropped."""
        self._masks.put({})
        self._plans.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def launch(self, plan: Plan) -> None:
        """Begin a plan; `collect` has been called for the last one."""
        self._plans.put(plan)

    def rest(self) -> None:
        """Give up what waits for the next plan at the cost of others, since none will come soon."""
        self._plans.put(_REST)

    def collect(self, masks: Masks) -> StepResult:
        """Wait for the plan under way and return its result, or raise what it raised.

        `masks` is called at the end of the forward pass, where rows are constrained.
        """
        outcome = self._outcomes.get()
        if outcome is None:
            given: Mapping[int, PackedMask] = {}
            try:
                given = masks()
            finally:  # the plan ends in any case: nothing may wait for its masks, nor find its outcome later
                self._masks.put(given)
                outcome = self._outcomes.get()
        if isinstance(outcome, Launched):
            return outcome.result()
        assert outcome is not None
        raise outcome

    def run(self, plan: Plan, masks: Masks) -> StepResult:
        """Launch and collect."""
        self.launch(plan)
        return self.collect(masks)

    # -- the thread -------------------------------------------------------------------------

    def _serve(self) -> None:
        while self._serve_one(time.monotonic()):
            pass

    def _serve_one(self, since: float) -> bool:
        """Run the next plan, of which nothing stays behind; return whether there was one."""
        plan = self._plans.get()
        while plan is _REST:
            release_workers()
            plan = self._plans.get()
        if plan is None:
            return False
        self.waited = time.monotonic() - since
        self._outcomes.put(self._outcome(plan))
        return True

    def _outcome(self, plan: Plan) -> Launched | BaseException:
        try:
            return self._runner.run(plan, self._given_masks)
        except BaseException as error:  # the caller's thread raises it
            return error

    def _given_masks(self) -> Mapping[int, PackedMask]:
        self._outcomes.put(None)
        return self._masks.get()
