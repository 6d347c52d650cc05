"""Two steps under way in thousands of random steps: rows go ahead of tokens that aren't known yet.

As in test_scheduler.py, a model of the device's memory remembers what was written to each slot, and every
token must find its own past, whatever ends, is late, or fails meanwhile.
"""

import itertools
import random
import threading
from collections import deque
from dataclasses import dataclass, replace

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import rule

from app.engine.blocks import SlotTable
from app.engine.engine import Engine, EngineConfig
from app.engine.plan import Plan, StepResult
from app.engine.runner import LateInputs, Launched
from app.engine.sampling.inputs import SampledToken
from app.engine.scheduler import Scheduler
from app.engine.sequence import Phase, Sequence
from app.engine.step import Step
from app.errors import PromptplexError
from app.models.decoder_only import DecoderOnly
from app.request import Request, SamplingParams, TokenScore
from app.sites import Site
from benchmarks.completions import submit
from tests.engine.conftest import Bench
from tests.engine.test_scheduler import (
    FULL,
    SITES,
    STOP_ID,
    CausalMachine,
    EncoderDecoderMachine,
    Ids,
    Machine,
    geometry,
    new_scheduler,
)

NEW_ID = itertools.count(10**6).__next__
GARBAGE = "what a failed step left"


@dataclass
class UnderWay:
    """A step that the device has, with what it will choose."""

    step: Step
    plan: Plan
    tokens: dict[int, SampledToken]


class AheadMachine(Machine):
    """A step is launched before the one before is applied, wherever the scheduler lets it."""

    def __init__(self) -> None:
        super().__init__()
        self.under_way: deque[UnderWay] = deque()
        self.num_ahead = 0  # tokens that were taken through the model before the scheduler knew them
        self.num_dropped = 0  # that were chosen and not wanted any more
        self.num_undone = 0  # steps

    def new_scheduler(self) -> Scheduler:
        return new_scheduler(self.shape, speculate=0, steps_in_flight=2)

    @rule(
        fates=st.lists(st.sampled_from(["go on"] * 6 + ["stop", "nan", "late"]), max_size=6),
        fails=st.sampled_from([False] * 15 + [True]),
        at_fault=st.sets(st.integers(0, 5), max_size=2),
    )
    def step(self, fates: list[str], fails: bool, at_fault: set[int]) -> None:
        """Launch a step where one may go ahead, else let the oldest end, or fail."""
        if not (self.scheduler.may_go_ahead and self.launch(fates)) and self.under_way:
            self.settle(fails, at_fault)

    def go_on(self) -> None:
        self.step([], False, set())

    def launch(self, fates: list[str]) -> bool:
        step = self.scheduler.schedule()
        self.parked += self.scheduler.take_loads()
        plan = step.plan()
        if plan.is_empty:
            return False
        self.check_plan(step)
        before = self.under_way[-1].tokens if self.under_way else {}
        ahead: dict[int, Ids] = {item.id: (before[item.id].token_id,) for item in plan.items if item.follows}
        self.num_ahead += len(ahead)
        self.device.run(step, plan, ahead)
        sampling = (item.id for item in plan.items if item.sampling)
        tokens = {
            id_: token_of(fate) for id_, fate in itertools.zip_longest(sampling, fates) if id_ is not None
        }
        self.under_way.append(UnderWay(step, plan, tokens))
        return True

    def settle(self, fails: bool, at_fault: set[int]) -> None:
        each = self.under_way.popleft()
        if fails and (self.under_way or each.plan.follows):
            self.undo(each)
            return
        failed = self.fail_alone(each, at_fault) if fails else set()
        result = StepResult({id_: (token,) for id_, token in each.tokens.items() if id_ not in failed})
        waiting = {
            id_
            for id_, row in each.step.sequences.items()
            if id_ in result.tokens and row.phase is Phase.RUNNING and id_ not in each.step.left
        }
        self.num_dropped += len(result.tokens) - len(waiting)
        late = {id_ for id_ in waiting if each.tokens[id_].is_late}
        outputs = self.scheduler.update(each.step, result, 0.0)
        assert {row.id for row, _ in outputs} == waiting - late
        assert all(each.step.sequences[id_].num_pending == 1 for id_ in late)
        for row, output in outputs:
            if isinstance(output, PromptplexError) or output.is_last:
                self.end(row.request.id, by_caller=False)

    def fail_alone(self, each: UnderWay, at_fault: set[int]) -> set[int]:
        """Nothing is behind the step: it runs again in parts, without the rows at fault, which end."""
        rows = [
            row
            for row in each.step.sequences.values()
            if row.phase is Phase.RUNNING and row.id not in each.step.left
        ]
        failed = {rows[place].id for place in at_fault if place < len(rows)}
        each.step.note_failures(each.plan, failed)
        for row in rows:
            if row.id in failed:
                row.is_held = False
                self.end(row.request.id, by_caller=True)
        return failed

    def undo(self, each: UnderWay) -> None:
        """The step fails, and what is behind it: whatever they wrote may be wrong."""
        self.num_undone += 1 + len(self.under_way)
        for plan in (each.plan, *(other.plan for other in self.under_way)):
            self.spoil(plan)
        self.under_way.clear()
        self.scheduler.start_over(each.step)
        assert self.scheduler.update(each.step, StepResult(), 0.0) == []

    def spoil(self, plan: Plan) -> None:
        at, memory = self.device.at, self.device.memory
        groups = [group for site in SITES for group in at[site]]
        written = [each for write in plan.writes for each in zip(groups, write.slots, strict=True)]
        for item in plan.items:
            own = item.kv.slots[: len(at[Site.DECODER_SELF])]
            written += zip(groups, (slots[-item.kv.num_tokens :] for slots in own), strict=False)
        for source in plan.sources:
            written += zip(at[Site.DECODER_CROSS], source.kv.cross_slots, strict=True)
        for group, slots in written:
            memory.update({(group.pool, slot): GARBAGE for slot in slots.tolist()})
        for copies in plan.copies:
            memory.update({(copies.pool, slot): GARBAGE for slot in copies.targets.tolist()})


def token_of(fate: str | None) -> SampledToken:
    token_id = STOP_ID if fate == "stop" else NEW_ID()
    return SampledToken(token_id, -1.0, fate != "nan", is_late=fate == "late")


class CausalAhead(AheadMachine, CausalMachine):
    pass


class FullAhead(CausalAhead):
    shape = geometry(DECODER_SELF=(FULL,))


class EncoderDecoderAhead(AheadMachine, EncoderDecoderMachine):
    pass


MANY = settings(
    max_examples=40, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)
TestCausalAhead = CausalAhead.TestCase
TestCausalAhead.settings = MANY
TestFullAhead = FullAhead.TestCase
TestFullAhead.settings = MANY
TestEncoderDecoderAhead = EncoderDecoderAhead.TestCase
TestEncoderDecoderAhead.settings = MANY


def crowd(machine: AheadMachine, seed: int = 1) -> AheadMachine:
    """Run a crowd for which there is too little memory; some end early, are late, or fail."""
    rng = random.Random(seed)
    for number in range(60):
        ids = tuple(1000 * number + place for place in range(rng.choice((1, 3, 20, 30))))
        machine.submit_request(
            Request(
                id=str(number),
                token_ids=ids,
                max_new_tokens=rng.randrange(1, 30),
                stop_ids=frozenset({STOP_ID}),
                is_held=number % 3 == 0,
            )
        )
        for _ in range(rng.randrange(8)):
            machine.step(rng.choices(["go on", "stop", "late"], [8, 1, 1], k=6), rng.random() < 0.05, set())
            machine.nothing_is_lost()
    machine.teardown()
    return machine


@pytest.mark.parametrize("machine", [CausalAhead, FullAhead])
def test_a_crowd_goes_ahead(machine: type[AheadMachine]) -> None:
    ran = crowd(machine())
    assert ran.num_ahead > 100
    assert ran.num_dropped > 10
    assert ran.num_undone > 4


@pytest.mark.parametrize("mistake", ["rows stay ahead", "windows are forgotten"])
def test_what_is_not_undone_is_noticed(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if mistake == "rows stay ahead":
        monkeypatch.setattr(Sequence, "go_back", lambda self, slot: None)
    else:
        monkeypatch.setattr(SlotTable, "covers", lambda self, start: True)
    with pytest.raises(AssertionError):
        all(crowd(CausalAhead(), seed) for seed in range(20))


@pytest.mark.parametrize(
    "sampling", [SamplingParams(), SamplingParams(repetition_penalty=1.3)], ids=["greedy", "penalised"]
)
def test_a_step_is_launched_while_the_one_before_runs(
    bench: Bench, llama_backbone: DecoderOnly, sampling: SamplingParams
) -> None:
    """No result is there before the next step is launched, as on a slow device; the tokens are the same."""
    config = EngineConfig(kv_cache_bytes=1 << 20, steps_in_flight=2)
    engine = Engine(llama_backbone, bench.source, config)
    launched = [threading.Event() for _ in range(8)]
    runner, places = engine._executor._runner, iter(range(8))
    run = runner.run

    def run_slowly(plan: Plan, late: LateInputs) -> Launched:
        place = next(places)
        launched[place].set()
        done = run(plan, late)

        def scores() -> dict[int, tuple[TokenScore, ...]]:
            assert launched[min(place + 1, 7)].wait(60)
            return done.scores()

        return replace(done, scores=scores)

    runner.run = run_slowly  # type: ignore[method-assign]
    engine.start()
    request = bench.request("ahead", sampling=sampling)
    assert submit(engine, request).result(60).token_ids == submit(bench.engine, request).result(60).token_ids
    engine.stop()
