"""The executor alone: what becomes of a plan when the caller's side of it fails."""

import os
import threading
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from app.engine.executor import Executor
from app.engine.plan import LateInput, Plan, PlanItem, StepResult
from app.engine.runner import LateInputs, Launched, Runner
from app.engine.sampling.inputs import LogitsEdits, SamplingInput
from app.models.attention.metadata import PackedItem
from app.models.cpu.openmp import loaded_runtime
from app.request import SamplingParams, TokenScore
from tests.waiting import wait_until

PLAN = Plan(writes=(), items=())


class MaskedRunner(Runner):
    """A step that only asks for late inputs."""

    def __init__(self) -> None:
        pass

    def run(self, plan: Plan, late: LateInputs) -> Launched:
        late()
        return Launched()


def test_masks_that_cannot_be_had_fail_their_own_plan_only() -> None:
    def fail() -> dict[int, object]:
        raise MemoryError("no room for a mask")

    executor = Executor(MaskedRunner())
    executor.start()
    with pytest.raises(MemoryError):
        executor.run(PLAN, fail)
    assert executor.run(PLAN, dict) == StepResult()
    executor.stop()


class MultiplyingRunner(Runner):
    """A step that only computes a product, with as many threads as there may be."""

    def __init__(self) -> None:
        pass

    def run(self, plan: Plan, late: LateInputs) -> Launched:
        assert (torch.ones(512, 512) @ torch.ones(512, 512))[0, 0] == 512
        return Launched()


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.skipif(loaded_runtime() is None, reason="torch has no GNU OpenMP here")
def test_workers_that_wait_for_products_end_with_the_work() -> None:
    executor = Executor(MultiplyingRunner())
    executor.start()
    before = _threads()
    for _ in range(2):
        assert executor.run(PLAN, dict) == StepResult()
        workers = _threads() - before
        assert workers
        executor.rest()
        wait_until(lambda: not workers & _threads())  # noqa: B023
    executor.stop()


def _threads() -> set[str]:
    return set(os.listdir("/proc/self/task"))


class NumberedRunner(Runner):
    """Scores are what was given late for the first item; a step without items fails."""

    def __init__(self) -> None:
        self.ran: list[int] = []

    def run(self, plan: Plan, late: LateInputs) -> Launched:
        (item,) = plan.items
        self.ran.append(item.id)
        if item.id < 0:
            raise IndexError(f"step {item.id}")
        return Launched(scores=partial(dict, [*late().items()] if item.has_late_input else []))


def numbered(id_: int, *, has_late_input: bool = False) -> Plan:
    sampling = (SamplingInput(SamplingParams(), 0, has_late_edits=has_late_input),)
    return Plan(writes=(), items=(PlanItem(id_, PackedItem(0, 1, ()), 0, sampling=sampling),))


def test_steps_under_way_end_in_their_order_and_only_one_that_asks_gets_inputs() -> None:
    runner = NumberedRunner()
    executor = Executor(runner)
    executor.start()
    for plan in (numbered(1), numbered(2, has_late_input=True), numbered(-3), numbered(4)):
        executor.launch(plan)
    given = LateInput(edits=LogitsEdits())
    assert executor.collect(lambda: pytest.fail("it asked for nothing")) == StepResult()
    assert executor.collect(lambda: {2: given}).scores == {2: given}
    with pytest.raises(IndexError, match="step -3"):
        executor.collect(dict)
    executor.launch(numbered(5))
    assert [executor.collect(dict) for _ in range(2)] == [StepResult()] * 2
    assert runner.ran == [1, 2, -3, 4, 5]
    executor.stop()


def test_nothing_waits_for_inputs_when_the_executor_stops() -> None:
    runner = NumberedRunner()
    executor = Executor(runner)
    executor.start()
    for id_ in (1, 2, 3):
        executor.launch(numbered(id_, has_late_input=True))
    wait_until(lambda: runner.ran)
    executor.stop()
    assert runner.ran == [1], "what had not begun is dropped"


def test_the_device_waits_only_where_nothing_was_launched() -> None:
    """A GPU's step is under way after its launch, until its result is there."""
    runner = SlowRunner()
    executor = Executor(runner)
    executor.start()
    executor.launch(numbered(1))
    executor.launch(numbered(2))
    runner.ends.set()
    executor.collect(dict)
    executor.collect(dict)
    assert executor.waited == 0, "the second was launched before the first had ended"
    executor.run(numbered(3), dict)
    assert executor.waited > 0
    executor.stop()


class SlowRunner(Runner):
    """A device that works on after the launch, until the test lets it end."""

    def __init__(self) -> None:
        self.ends = threading.Event()
        self.num_launched = 0

    def run(self, plan: Plan, late: LateInputs) -> Launched:
        self.num_launched += 1
        return Launched(scores=self._scores, is_done=False)

    def _scores(self) -> dict[int, tuple[TokenScore, ...]]:
        assert self.ends.wait(60)
        wait_until(lambda: self.num_launched > 1)
        return {}
