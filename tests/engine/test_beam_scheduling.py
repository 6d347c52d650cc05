"""Beams in thousands of random steps: each row finds its own past, however its blocks are shared and copied.

As in test_scheduler.py, a model of the device's memory remembers what was written to each slot.
"""

import itertools
import random
from contextlib import nullcontext
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import rule

from app.engine.blocks import KVBlocks, _Part
from app.engine.plan import StepResult
from app.engine.sampling.inputs import Candidate, SampledToken
from app.engine.sequence import Phase, Sequence
from app.errors import ConstraintFailed, PromptplexError
from app.request import Request, SamplingParams
from tests.engine.test_scheduler import STOP_ID, CausalMachine, EncoderDecoderMachine, Machine

NEW_ID = itertools.count(10**6).__next__  # so that no two beams say the same


def chosen(row: Sequence, rng: random.Random) -> SampledToken:
    """A token, or few or many candidates, some of which end the answer."""
    if row.beams is None:
        return SampledToken(STOP_ID if rng.random() < 0.1 else NEW_ID(), -1.0, True)
    enough = row.beams.search.num_beams + 1
    ids = [
        STOP_ID if rng.random() < 0.1 else NEW_ID() for _ in range(rng.choice((enough, enough, enough, 1, 0)))
    ]
    candidates = tuple(Candidate(id_, -rng.random() - place, -1.0) for place, id_ in enumerate(ids))
    error = None if ids else ConstraintFailed("no token may come")
    return SampledToken(0, -1.0, rng.random() > 0.02, error=error, candidates=candidates)


class BeamMachine(Machine):
    """Some requests search with beams; a step may run in parts, as after a failure."""

    def submit_request(self, request: Request) -> None:
        beams = (2, 1, 5, 3)[self.number % 4]
        sampling = SamplingParams(num_beams=beams, early_stopping=self.number % 3 > 0)
        super().submit_request(replace(request, sampling=sampling))

    @rule(
        fate=st.sampled_from(["whole", "in parts"]),
        pick=st.integers(0, 1 << 16),
        late=st.just(set()),
        leaving=st.sets(st.integers(0, 5), max_size=1),
        failing=st.sets(st.integers(0, 5), max_size=1),
        plans_ahead=st.booleans(),
    )
    def step(
        self, fate: str, pick: int, late: set[int], leaving: set[int], failing: set[int], plans_ahead: bool
    ) -> None:
        rng = random.Random(pick)
        step = self.scheduler.schedule()
        self.parked += self.scheduler.take_loads()
        self.check_plan(step)
        plan = step.plan()
        rows = [owner for owner in step.owners.values() if isinstance(owner, Sequence)]
        failed = {rows[i].id for i in failing if i < len(rows)}
        ids = {*step.owners} - failed
        self.device.run(step, plan.part(ids))
        if fate == "in parts":  # what ran once runs again
            self.device.run(step, plan.part({each.id for each in rows[::2]} & ids))
        step.note_failures(plan, failed)
        for row in [each for each in rows if each.id in failed] + [rows[i] for i in leaving if i < len(rows)]:
            if row.phase is not Phase.FINISHED:
                row.is_held &= row.id not in failed
                self.end(row.request.id, by_caller=True)
        if plans_ahead:
            self.scheduler.plan_ahead(step)
            self.scheduler.check_integrity()
        samples = {item.id for item in plan.items if item.sampling} - failed
        result = StepResult({row.id: (chosen(row, rng),) for row in rows if row.id in samples})
        for leader, output in self.scheduler.update(step, result, 0.0):
            if isinstance(output, PromptplexError) or output.is_last:
                self.end(leader.request.id, by_caller=False)


class CausalBeams(BeamMachine, CausalMachine):
    pass


class EncoderDecoderBeams(BeamMachine, EncoderDecoderMachine):
    pass


FEW = settings(
    max_examples=20, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestCausalBeams = CausalBeams.TestCase
TestCausalBeams.settings = FEW
TestEncoderDecoderBeams = EncoderDecoderBeams.TestCase
TestEncoderDecoderBeams.settings = FEW


@pytest.mark.parametrize("mistake", [None, "no copy", "no block of its own"])
def test_writes_into_blocks_that_others_hold_are_noticed(
    mistake: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mistake == "no copy":
        monkeypatch.setattr(KVBlocks, "take_copies", lambda self: ())
    elif mistake is not None:
        monkeypatch.setattr(_Part, "shared", lambda self, start, pool: [])
    machine = CausalBeams()
    machine.number = 3  # so many beams
    machine.submit_request(Request(id="1", token_ids=(1, 2, 3), max_new_tokens=12))
    with nullcontext() if mistake is None else pytest.raises(AssertionError):
        for pick in range(10):
            machine.step("whole", pick, set(), set(), set(), plans_ahead=True)
