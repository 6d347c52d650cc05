"""The executor alone: what becomes of a plan when the caller's side of it fails."""

import pytest

from app.engine.executor import Executor
from app.engine.plan import Plan, StepResult
from app.engine.runner import Masks, Runner

PLAN = Plan(writes=(), items=())


class MaskedRunner(Runner):
    """A step that only asks for masks."""

    def __init__(self) -> None:
        pass

    def run(self, plan: Plan, masks: Masks) -> StepResult:
        masks()
        return StepResult()


def test_masks_that_cannot_be_had_fail_their_own_plan_only() -> None:
    def fail() -> dict[int, object]:
        raise MemoryError("no room for a mask")

    executor = Executor(MaskedRunner())
    executor.start()
    with pytest.raises(MemoryError):
        executor.run(PLAN, fail)
    assert executor.run(PLAN, dict) == StepResult()
    executor.stop()
