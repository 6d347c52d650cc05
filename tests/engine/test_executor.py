"""The executor alone: what becomes of a plan when the caller's side of it fails."""

import os
from collections.abc import Iterator

import pytest
import torch

from app.engine.executor import Executor
from app.engine.plan import Plan, StepResult
from app.engine.runner import LateInputs, Launched, Runner
from app.models.cpu.openmp import loaded_runtime
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
