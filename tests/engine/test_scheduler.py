"""Thousands of random steps: blocks and pins are conserved, and every token attends to its own past.

Beside the scheduler runs a model of the device's memory that remembers who wrote what into each
slot. Every planned token must find, in the slots that it attends to, its prefix and its own
earlier tokens in order, and nothing of anybody else; in a window group, as far as the window reaches.
"""

from collections.abc import Iterable
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from app.engine.blocks import KVBlocks, table_groups
from app.engine.plan import PlanItem, StepResult
from app.engine.prefixes import Prefix, prefix_keys
from app.engine.sampling.inputs import SampledToken
from app.engine.scheduler import Scheduler, SchedulerConfig
from app.engine.sequence import Phase, Sequence
from app.engine.step import Step
from app.errors import PromptplexError, RequestTooLong
from app.models.attention.kv_cache import Slots, group_layers
from app.prompt import LayerGeometry, ModelGeometry, Prompt, PromptKind
from app.request import Request, Segment, TokenDelta, TokenScore, segments_of
from app.sites import Site

GEOMETRY = ModelGeometry(
    architecture="test",
    hidden_size=4,
    vocab_size=100,
    max_positions=1000,
    layers={
        Site.DECODER_SELF: (
            LayerGeometry(1, 4, 4),
            LayerGeometry(1, 4, 4, window=8),
            LayerGeometry(2, 4, 4, window=5),
        )
    },
    dtype="float32",
    fingerprint="test",
)
BLOCK_SIZE = 4
NUM_BLOCKS = 24  # for the full group of a row that is alone
NUM_WINDOW_BLOCKS = 7  # in the window group that shares the pool, however long it is
MAX_ROWS = 6
TOKEN_BUDGET = 13
STOP_ID = 99
GROUPS = table_groups(
    group_layers(GEOMETRY.layers), torch.float32, block_size=BLOCK_SIZE, max_chunk=TOKEN_BUDGET
)


def prompt(name: str, kind: PromptKind, length: int, offset: int) -> Prompt:
    return Prompt(
        digest=name,
        kind=kind,
        num_virtual_tokens=length,
        position_offset=offset,
        tensors={},
        data_start=0,
        data=b"",
    )


PROMPTS = [
    prompt("soft", PromptKind.SOFT, 7, 7),
    prompt("one", PromptKind.SOFT, 1, 1),
    prompt("long", PromptKind.SOFT, 30, 30),
    prompt("prefix", PromptKind.PREFIX, 9, 9),
    prompt("unshifted", PromptKind.PREFIX, 5, 0),
]


def learned(prompt: Prompt) -> Segment:
    return Segment(prompt_digest=prompt.digest, num_virtual_tokens=prompt.num_virtual_tokens)


def num_positions(prefixes: Iterable[Prefix]) -> int:
    """Positions that all these take."""
    offsets = {prompt.digest: prompt.position_offset for prompt in PROMPTS}
    segments = [prefix.segment for prefix in prefixes]
    return sum(offsets.get(segment.prompt_digest or "", len(segment.token_ids)) for segment in segments)


def new_scheduler() -> Scheduler:
    blocks = KVBlocks(GROUPS, (NUM_BLOCKS + NUM_WINDOW_BLOCKS + 1, 16 + 1))
    config = SchedulerConfig(max_rows=MAX_ROWS, token_budget=TOKEN_BUDGET)
    return Scheduler(blocks, config)


def result_of(step: Step, tokens: list[SampledToken]) -> StepResult:
    """`tokens` for the sampling items, in the Plan's order."""
    ids = [item.id for item in step.plan().items if item.sampling is not None]
    return StepResult(dict(zip(ids, tokens, strict=True)))


def expected_content(owner: Sequence | Prefix, num_slots: int) -> list[object]:
    """What the first `num_slots` slots of an owner must hold."""
    if isinstance(owner, Prefix):
        above = [] if owner.parent is None else expected_content(owner.parent, owner.first_slot)
        return [*above, *((owner.key, i) for i in range(num_slots - owner.first_slot))]
    segments = zip(owner.prefix_keys, owner.request.segments, strict=True)
    head = [(key, i) for key, segment in segments for i in range(segment.num_slots)]
    return [*head, *((owner.request.id, token) for token in owner.tokens)][:num_slots]


class Device:
    """Remembers what was written to each slot of each pool, and for which KV group."""

    def __init__(self) -> None:
        self.memory: dict[tuple[int, int], object] = {}  # (pool, slot) -> (group, content)

    def run(self, step: Step) -> None:
        plan, owners = step.plan(), step.owners
        for write in plan.writes:
            owner = owners[write.id]
            assert isinstance(owner, Prefix)
            content = expected_content(owner, owner.end_slot)
            self.write(write.slots, content, write.prompt.num_virtual_tokens)
        for item in plan.items:  # all writes of a step come before all reads
            content = expected_content(owners[item.id], item.kv.num_computed + item.kv.num_tokens)
            self.write(item.kv.slots, content, item.kv.num_tokens)
        for item in plan.items:
            self.check(item, owners[item.id])

    def write(self, groups: tuple[Slots, ...], content: list[object], num_new: int) -> None:
        """Put the last `num_new` of a content where its slots are; a window group may leave some out."""
        for number, (slots, group) in enumerate(zip(groups, GROUPS, strict=True)):
            assert 0 not in slots, "the padding block is nobody's"
            new = slots[-num_new:].tolist()
            assert len(new) == len(set(new))
            for slot, each in zip(new, content[-len(new) :], strict=True):
                self.memory[group.pool, slot] = number, each

    def check(self, item: PlanItem, owner: Sequence | Prefix) -> None:
        """Each group holds what the item's tokens may see, and slots for little more than that."""
        num_slots = item.kv.num_computed + item.kv.num_tokens
        content = expected_content(owner, num_slots)
        for number, (slots, group) in enumerate(zip(item.kv.slots, GROUPS, strict=True)):
            visible = min(num_slots, item.kv.num_tokens - 1 + (group.window or num_slots))
            found = [self.memory.get((group.pool, slot)) for slot in slots[-visible:].tolist()]
            assert found == [(number, each) for each in content[-visible:]]
            assert len(slots) <= (group.window or num_slots) + BLOCK_SIZE * group.max_blocks


class SchedulerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.parked: list[Sequence] = []
        self.scheduler = new_scheduler()
        self.device = Device()
        self.sequences: dict[str, Sequence] = {}
        self.ended: set[str] = set()
        self.number = 0

    @rule(
        prompts=st.lists(st.sampled_from(PROMPTS), max_size=2),
        num_resident=st.sampled_from([0, 0, 1, 6]),
        num_transient=st.sampled_from([0, 0, 10]),
        num_tokens=st.integers(1, 30),
        max_new_tokens=st.integers(1, 20),
        tenant=st.sampled_from(["a", "b"]),
    )
    def submit(
        self,
        prompts: list[Prompt],
        num_resident: int,
        num_transient: int,
        num_tokens: int,
        max_new_tokens: int,
        tenant: str,
    ) -> None:
        self.number += 1
        request = Request(
            id=str(self.number),
            # Ids that are unique to the request, so that a stranger's token is recognised.
            token_ids=tuple(1000 * self.number + i for i in range(num_tokens)),
            segments=segments_of(
                *map(learned, prompts),
                Segment(token_ids=tuple(range(num_resident))),
                Segment(token_ids=tuple(range(num_transient)), is_kept=False),
            ),
            max_new_tokens=max_new_tokens,
            stop_ids=frozenset({STOP_ID}),
            tenant=tenant,
            task=prompts[0].digest if prompts else "",
        )
        try:
            self.scheduler.check_fits(request)
        except RequestTooLong:
            return
        sequence = Sequence(request, prefix_keys(request.segments, GEOMETRY))
        self.sequences[request.id] = sequence
        self.scheduler.add(sequence)
        self.parked += self.scheduler.take_loads()

    @rule(data=st.data())
    @precondition(lambda self: self.parked)
    def a_prompt_arrives(self, data: st.DataObject) -> None:
        sequence = self.parked[data.draw(st.integers(0, len(self.parked) - 1))]
        if sequence.phase is Phase.LOADING:
            digest = data.draw(st.sampled_from(sorted(sequence.awaited)))
            self.scheduler.loaded(sequence, next(each for each in PROMPTS if each.digest == digest))
        self.parked = [each for each in self.parked if each.phase is Phase.LOADING]

    @rule(data=st.data())
    @precondition(lambda self: self.sequences)
    def cancel(self, data: st.DataObject) -> None:
        self.end(data.draw(st.sampled_from(sorted(self.sequences))), by_caller=True)

    @rule(
        fate=st.sampled_from(["go on", "go on", "go on", "stop", "nan"]),
        pick=st.integers(0, 5),
        late=st.sets(st.integers(0, 5), max_size=3),
        leaving=st.sets(st.integers(0, 5), max_size=2),
        plans_ahead=st.booleans(),
    )
    def step(self, fate: str, pick: int, late: set[int], leaving: set[int], plans_ahead: bool) -> None:
        """One step. Rows that are `leaving` end while it runs; no token can be chosen for `late` ones yet."""
        step = self.scheduler.schedule()
        self.parked += self.scheduler.take_loads()
        self.check_plan(step)
        self.device.run(step)
        order = [step.owners[item.id] for item in step.plan().items if item.sampling is not None]
        sampling = [owner for owner in order if isinstance(owner, Sequence)]
        for sequence in [sampling[i] for i in leaving if i < len(sampling)]:
            self.end(sequence.request.id, by_caller=True)
        if plans_ahead:
            self.scheduler.plan_ahead(step)
            self.scheduler.check_integrity()
        tokens = [SampledToken(50 + i, -1.0, True) for i in range(len(sampling))]
        if sampling and fate != "go on":
            tokens[pick % len(tokens)] = SampledToken(STOP_ID, -1.0, fate == "stop")
        tokens = [replace(token, is_late=i in late) for i, token in enumerate(tokens)]
        staying = [sequence for sequence in sampling if sequence.phase is Phase.RUNNING]
        waiting = [sampling[i] for i in late if i < len(sampling) and sampling[i] in staying]
        before = [list(sequence.tokens) for sequence in waiting]
        news = self.scheduler.update(step, result_of(step, tokens), 0.0)
        assert {id(sequence) for sequence, _ in news} == {id(each) for each in staying if each not in waiting}
        for sequence, its_tokens in zip(waiting, before, strict=True):
            assert (sequence.tokens, sequence.num_pending) == (its_tokens, 1)
        for sequence, output in news:
            if isinstance(output, PromptplexError) or output.is_last:
                self.end(sequence.request.id, by_caller=False)

    def check_plan(self, step: Step) -> None:
        plan = step.plan()
        sizes = [item.kv.num_tokens for item in plan.items]
        assert sum(sizes) <= TOKEN_BUDGET
        assert len(self.scheduler.running) <= MAX_ROWS
        assert sizes == sorted(sizes, key=lambda size: size > 1), "rows of one token come first"
        for item in plan.items:
            sequence = step.owners[item.id]
            if isinstance(sequence, Sequence):
                assert all(prefix.is_ready for prefix in sequence.prefixes), "a row runs on what isn't there"
                assert item.stands_on == tuple(prefix.id for prefix in sequence.prefixes)
                first, begin = sequence.request.num_prefix_slots, num_positions(sequence.prefixes)
                assert len(item.token_ids) == item.kv.num_tokens
            else:
                above = []
                while (parent := (above[-1] if above else sequence).parent) is not None:
                    above.append(parent)
                first, begin = sequence.first_slot, num_positions(above)
                assert item.soft_from == item.kv.num_computed - first
            assert item.position == begin + item.kv.num_computed - first

    def end(self, request_id: str, *, by_caller: bool) -> None:
        sequence = self.sequences.pop(request_id)
        assert request_id not in self.ended, "a request ends once"
        self.ended.add(request_id)
        if by_caller:
            self.scheduler.finish(sequence)
        assert sequence.phase is Phase.FINISHED
        assert sequence.table is None

    @invariant()
    def nothing_is_lost(self) -> None:
        self.scheduler.check_integrity()
        assert self.scheduler.num_open == len(self.sequences)
        held = [sequence for sequence in self.sequences.values() if sequence.prompts]
        assert all(each.phase in (Phase.LOADING, Phase.WAITING) for each in held), (
            "bytes are let go at admission"
        )

    def teardown(self) -> None:
        """Whatever the state, everything ends when prompts arrive and steps go on."""
        for _ in range(5000):
            if not self.sequences:
                break
            while self.parked:
                sequence = self.parked.pop()
                for digest in sorted(sequence.awaited) if sequence.phase is Phase.LOADING else ():
                    self.scheduler.loaded(sequence, next(each for each in PROMPTS if each.digest == digest))
            self.step("go on", 0, set(), set(), plans_ahead=True)
            self.scheduler.check_integrity()
        assert not self.sequences, "every accepted request ends"


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=100, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_what_can_never_fit_is_refused_and_what_just_fits_is_not() -> None:
    scheduler = new_scheduler()
    capacity, limit = (count * BLOCK_SIZE for count in (NUM_BLOCKS, NUM_BLOCKS + NUM_WINDOW_BLOCKS))
    just_fits = Request(id="a", token_ids=(1,) * (capacity - 10), max_new_tokens=10)
    scheduler.check_fits(just_fits)
    too_long = Request(id="b", token_ids=(1,) * (capacity - 10), max_new_tokens=11)
    with pytest.raises(RequestTooLong, match=f"the server has {limit}"):
        scheduler.check_fits(too_long)


def test_a_request_that_fills_the_memory_runs_when_idle_prefixes_must_go() -> None:
    scheduler = new_scheduler()
    soft = PROMPTS[2]
    first = Request(id="1", token_ids=(1, 2), max_new_tokens=1, segments=(learned(PROMPTS[2]),))
    sequence = Sequence(first, prefix_keys(first.segments, GEOMETRY))
    scheduler.add(sequence)
    scheduler.loaded(scheduler.take_loads()[0], soft)
    while sequence.phase is not Phase.FINISHED:
        step = scheduler.schedule()
        tokens = [SampledToken(5, 0.0, True) for item in step.items if item.sampling is not None]
        scheduler.update(step, result_of(step, tokens), 0.0)
    assert [prefix.is_ready for prefix in scheduler.prefixes] == [True], "it stays for the next request"
    huge = Request(id="2", token_ids=(1,) * (NUM_BLOCKS * BLOCK_SIZE - 1), max_new_tokens=1)
    giant = Sequence(huge)
    scheduler.add(giant)
    scheduler.schedule()
    assert giant.phase is Phase.RUNNING
    assert len(scheduler.prefixes) == 0
    scheduler.check_integrity()


def test_a_late_row_keeps_its_scores_and_takes_its_last_token_again() -> None:
    scheduler = new_scheduler()
    request = Request(id="1", token_ids=(1, 2, 3, 4), num_scored=3, max_new_tokens=3)
    sequence = Sequence(request)
    scheduler.add(sequence)
    scores = tuple(TokenScore(id_, -1.0) for id_ in (2, 3, 4))
    step = scheduler.schedule()
    assert step.items[0].score_ids == (2, 3, 4)
    late = SampledToken(7, -1.0, True, is_late=True)
    assert scheduler.update(step, StepResult({sequence.id: late}, {sequence.id: scores}), 0.0) == []
    for _ in range(2):
        step = scheduler.schedule()
        (item,) = step.items
        assert (item.token_ids, item.kv.num_computed, item.position, item.score_ids) == ((4,), 3, 3, ())
        assert scheduler.update(step, result_of(step, [late]), 0.0) == []
    step = scheduler.schedule()
    ((_, delta),) = scheduler.update(step, result_of(step, [SampledToken(7, -1.0, True)]), 0.0)
    assert isinstance(delta, TokenDelta)
    assert (delta.token_id, delta.scores) == (7, scores)
    assert scheduler.schedule().items[0].token_ids == (7,)


def test_config_refuses_a_budget_below_the_rows() -> None:
    with pytest.raises(ValueError, match="token_budget"):
        SchedulerConfig(max_rows=8, token_budget=7)
