"""The executor: runs Plans in order, on the one thread that does all of the engine's torch work.

Between `launch` and `collect` the caller is free to do what the plans' outcome doesn't change, and to launch
the next one. Since Plans run in order, slots that are given back meanwhile can be handed out again: a later
Plan writes them after this one's reads and writes.
"""

import queue
import threading
import time
from collections.abc import Mapping
from typing import NamedTuple

from app.engine.plan import LateInput, Plan, StepResult
from app.engine.runner import LateInputs, Launched, Runner
from app.models.cpu.openmp import release_workers

_REST = Plan(writes=(), items=())  # stands for no plan: the thread rests


class _Outcome(NamedTuple):
    """What came of a plan."""

    launched: Launched | BaseException
    began: float  # time.monotonic(), as all times
    ended: float  # the thread was done with it


class Executor:
    """Launches Plans one after the other; `collect` takes their results in the same order. For one caller."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._plans: queue.SimpleQueue[Plan | None] = queue.SimpleQueue()
        self._late: queue.SimpleQueue[Mapping[int, LateInput]] = queue.SimpleQueue()
        # None where a plan's forward pass is launched, and its late inputs are to be given.
        self._outcomes: queue.SimpleQueue[_Outcome | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="promptplex-device", daemon=True)
        self._is_stopping = False
        self._device_done = 0.0  # with the plan that was collected last
        self.waited = 0.0  # seconds for which the device had nothing to do before the one collected last

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the plan under way. Outcomes, and plans that have not begun, are dropped."""
        self._is_stopping = True
        self._late.put({})
        self._plans.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def launch(self, plan: Plan) -> None:
        """Begin a plan after those that are under way."""
        self._plans.put(plan)

    def rest(self) -> None:
        """Give up what waits for the next plan at the cost of others, since none will come soon."""
        self._plans.put(_REST)

    def collect(self, late: LateInputs) -> StepResult:
        """Wait for the oldest plan under way and return its result, or raise what it raised.

        `late` is called when its forward pass is launched, where rows have late inputs.
        """
        outcome = self._outcomes.get()
        if outcome is None:
            given: Mapping[int, LateInput] = {}
            try:
                given = late()
            finally:  # the plan ends in any case: nothing may wait for its inputs, nor find its outcome later
                self._late.put(given)
                outcome = self._outcomes.get()
        assert outcome is not None
        return self._result(outcome)

    def _result(self, outcome: _Outcome) -> StepResult:
        self.waited = max(0.0, outcome.began - self._device_done)
        self._device_done = outcome.ended
        if isinstance(outcome.launched, BaseException):
            raise outcome.launched
        try:
            return outcome.launched.result()
        finally:
            if not outcome.launched.is_done:
                self._device_done = time.monotonic()

    def run(self, plan: Plan, late: LateInputs) -> StepResult:
        """Launch and collect, where nothing else is under way."""
        self.launch(plan)
        return self.collect(late)

    # -- the thread -------------------------------------------------------------------------

    def _serve(self) -> None:
        while self._serve_one():
            pass

    def _serve_one(self) -> bool:
        """Run the next plan, of which nothing stays behind; return whether there was one."""
        plan = self._plans.get()
        while plan is _REST:
            release_workers()
            plan = self._plans.get()
        if plan is None or self._is_stopping:
            return False
        began = time.monotonic()
        self._outcomes.put(_Outcome(self._launched(plan), began, time.monotonic()))
        return True

    def _launched(self, plan: Plan) -> Launched | BaseException:
        try:
            return self._runner.run(plan, self._given)
        except BaseException as error:  # the caller's thread raises it
            return error

    def _given(self) -> Mapping[int, LateInput]:
        if self._is_stopping:
            return {}
        self._outcomes.put(None)
        return self._late.get()
