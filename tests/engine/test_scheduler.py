"""Thousands of random steps: blocks and pins are conserved, and every token attends to its own past.

Beside the scheduler runs a model of the device's memory that remembers who wrote what into each
slot. Every planned token must find, in the slots that it attends to, its prefix and its own
earlier tokens in order, and nothing of anybody else; in a window group, as far as the window reaches.
What a sequence continues is its own too: slots hold a token with all that came before it.
In an encoder-decoder it must find its whole source too, with the prefix before it.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from app.engine.blocks import KVBlocks, TableGroup, table_groups
from app.engine.plan import Plan, PlanItem, SourceItem, StepResult
from app.engine.prefixes import Prefix, prefix_keys, segment_slots
from app.engine.sampling.inputs import SampledToken
from app.engine.scheduler import Scheduler, SchedulerConfig
from app.engine.sequence import Phase, Sequence
from app.engine.sources import Source
from app.engine.step import Step
from app.errors import PromptplexError, RequestTooLong
from app.models.attention.backend import Context
from app.models.attention.kv_cache import Slots, group_layers
from app.models.attention.metadata import contexts_of
from app.prompt import LayerGeometry, ModelGeometry, Prompt, PromptKind
from app.request import Request, Segment, TokenDelta, TokenScore, segments_of
from app.request import Source as Input
from app.sites import Site


def geometry(**layers: tuple[LayerGeometry, ...]) -> ModelGeometry:
    at = {site: layers[site.name] for site in SITES if site.name in layers}
    return ModelGeometry(
        architecture="test",
        hidden_size=4,
        vocab_size=100,
        max_positions=1000,
        max_source_positions=1000 if Site.DECODER_CROSS in at else 0,
        layers=at,
        dtype="float32",
        fingerprint="test",
    )


SITES = (Site.DECODER_SELF, Site.DECODER_CROSS, Site.ENCODER_SELF)
FULL = LayerGeometry(1, 4, 4)
GEOMETRY = geometry(DECODER_SELF=(FULL, replace(FULL, window=8), LayerGeometry(2, 4, 4, window=5)))
# Both of the decoder's sites draw from one pool; the encoder has more layers.
WITH_ENCODER = geometry(DECODER_SELF=(FULL,), DECODER_CROSS=(FULL,), ENCODER_SELF=(FULL, FULL))
BLOCK_SIZE = 4
NUM_BLOCKS = 24  # for the full group of a row that is alone
NUM_WINDOW_BLOCKS = 7  # in the window group that shares the pool, however long it is
MAX_ROWS = 6
TOKEN_BUDGET = 13
STOP_ID = 99


Ids = tuple[int, ...]


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


CAUSAL_PROMPTS = [
    prompt("soft", PromptKind.SOFT, 7, 7),
    prompt("one", PromptKind.SOFT, 1, 1),
    prompt("long", PromptKind.SOFT, 30, 30),
    prompt("prefix", PromptKind.PREFIX, 9, 9),
    prompt("unshifted", PromptKind.PREFIX, 5, 0),
]


PREFIXES = {  # of an encoder-decoder: virtual tokens at each of SITES
    "three": (5, 3, 6),
    "cross": (0, 4, 0),
    "self": (9, 0, 0),
    "encoder": (0, 0, 2),
}
PROMPTS = [*CAUSAL_PROMPTS, *(prompt(name, PromptKind.PREFIX, 9, 0) for name in PREFIXES)]


def learned(prompt: Prompt) -> Segment:
    return Segment(prompt_digest=prompt.digest, num_virtual_tokens=prompt.num_virtual_tokens)


def prefix_of(name: str) -> Segment:
    at_self, at_cross, at_encoder = PREFIXES[name]
    return Segment(
        prompt_digest=name,
        num_virtual_tokens=at_self,
        num_cross_tokens=at_cross,
        num_encoder_tokens=at_encoder,
    )


def num_positions(prefixes: Iterable[Prefix]) -> int:
    """Positions that all these take."""
    offsets = {prompt.digest: prompt.position_offset for prompt in PROMPTS}
    segments = [prefix.segment for prefix in prefixes]
    return sum(offsets.get(segment.prompt_digest or "", len(segment.token_ids)) for segment in segments)


def new_scheduler(shape: ModelGeometry = GEOMETRY, **config: int) -> Scheduler:
    groups = table_groups(
        group_layers(shape.layers), torch.float32, block_size=BLOCK_SIZE, max_chunk=TOKEN_BUDGET
    )
    num_blocks = (NUM_BLOCKS + NUM_WINDOW_BLOCKS + 1, 16 + 1)
    blocks = KVBlocks(groups, num_blocks[: len({group.pool for group in groups})])
    bounds = {"max_rows": MAX_ROWS, "token_budget": TOKEN_BUDGET, "speculate": 4} | config
    return Scheduler(blocks, SchedulerConfig(**bounds))


def result_of(step: Step, tokens: list[SampledToken]) -> StepResult:
    """`tokens` for the sampling items, in the Plan's order."""
    ids = [item.id for item in step.plan().items if item.sampling]
    return StepResult({id_: (token,) for id_, token in zip(ids, tokens, strict=True)})


def prefix_content(owner: Sequence | Prefix, site: Site) -> list[object]:
    """What the slots of all that an owner stands on must hold; a prefix stands on itself."""
    if isinstance(owner, Prefix):
        above = [] if owner.parent is None else prefix_content(owner.parent, site)
        return [*above, *((owner.key, i) for i in range(segment_slots(owner.segment)[site]))]
    segments = zip(owner.prefix_keys, owner.request.segments, strict=True)
    return [(key, i) for key, segment in segments for i in range(segment_slots(segment)[site])]


def expected_content(owner: Sequence | Prefix, num_slots: int, guesses: Ids = ()) -> list[object]:
    """What the first `num_slots` slots of an owner must hold in the decoder's self-attention."""
    head = prefix_content(owner, Site.DECODER_SELF)
    return [*head, *([] if isinstance(owner, Prefix) else own_content(owner, guesses))][:num_slots]


def own_content(owner: Sequence, guesses: Ids) -> list[object]:
    history = hash((owner.prefix_keys, owner.request.source))
    return [(token, history := hash((history, token))) for token in (*owner.tokens, *guesses)]


def source_content(source: Source) -> list[object]:
    return [(source.input.id, i) for i in range(source.input.num_slots)]


def after_guesses(token: SampledToken, guesses: Ids, num_right: int) -> tuple[SampledToken, ...]:
    """What a row with guesses gets: `token` comes after those that are right."""
    right = [token._replace(token_id=guess, is_finite=True) for guess in guesses[:num_right]]
    return (*right, *[token] * (1 + len(guesses) - len(right)))


class Device:
    """Remembers what was written to each slot of each pool, and for which KV group."""

    def __init__(self, groups: tuple[TableGroup, ...]) -> None:
        self.at = {site: [group for group in groups if group.site is site] for site in SITES}
        self.memory: dict[tuple[int, int], object] = {}  # (pool, slot) -> (group, content)
        self.num_encoded: Counter[int] = Counter()  # passes through the encoder, by source

    def run(self, step: Step, plan: Plan, under_way: Mapping[int, Ids] | None = None) -> None:
        """Run a plan of a step; `under_way` are tokens, by id, that the scheduler doesn't know yet."""
        owners, ahead = step.owners, {**step.guesses, **(under_way or {})}
        for copies in plan.copies:
            pairs = zip(copies.sources.tolist(), copies.targets.tolist(), strict=True)
            found = {target: self.memory.get((copies.pool, source)) for source, target in pairs}
            self.memory.update({(copies.pool, slot): each for slot, each in found.items()})
        for write in plan.writes:
            owner = owners[write.id]
            assert isinstance(owner, Prefix)
            groups = iter(write.slots)
            for site in SITES:
                slots = [next(groups) for _ in self.at[site]]
                self.write(site, slots, prefix_content(owner, site), segment_slots(owner.segment)[site])
            assert not [*groups]
        for item in plan.sources:
            self.encode(
                item, step.sources[item.id], owners[next(i.id for i in plan.items if i.reads == item.id)]
            )
        num_self = len(self.at[Site.DECODER_SELF])
        for item in plan.items:  # all writes of a step come before all reads
            guesses = ahead.get(item.id, ())
            content = expected_content(owners[item.id], item.kv.num_computed + item.kv.num_tokens, guesses)
            self.write(Site.DECODER_SELF, item.kv.slots[:num_self], content, item.kv.num_tokens)
        for item in plan.items:
            self.check(item, owners[item.id], ahead.get(item.id, ()))

    def encode(self, item: SourceItem, source: Source, reader: Sequence | Prefix) -> None:
        """The encoder's rows see the resident prefix; what comes of them goes to cross-attention."""
        prefix = prefix_content(reader, Site.ENCODER_SELF)
        slots = item.kv.prefix_slots or [()] * len(self.at[Site.ENCODER_SELF])
        for group, its_slots in zip(self.at[Site.ENCODER_SELF], slots, strict=True):
            assert self.found(group, its_slots) == [(group.number, each) for each in prefix]
        assert item.kv.num_tokens == source.input.num_slots
        assert item.token_ids == source.input.token_ids
        assert (item.soft_prompt is None) == (source.input.prompt_digest is None)
        self.write(Site.DECODER_CROSS, item.kv.cross_slots, source_content(source), item.kv.num_tokens)
        self.num_encoded[source.id] += 1

    def write(self, site: Site, slots: Iterable[Slots], content: list[object], num_new: int) -> None:
        """Put the last `num_new` of a content where its slots are; a window group may leave some out."""
        for its_slots, group in zip(slots, self.at[site], strict=True):
            assert 0 not in its_slots, "the padding block is nobody's"
            new = its_slots[len(its_slots) - min(num_new, len(its_slots)) :].tolist()
            assert len(new) == len(set(new))
            for slot, each in zip(new, content[len(content) - len(new) :], strict=True):
                self.memory[group.pool, slot] = group.number, each

    def found(self, group: TableGroup, slots: Iterable[int]) -> list[object]:
        return [self.memory.get((group.pool, slot)) for slot in slots]

    def check(self, item: PlanItem, owner: Sequence | Prefix, guesses: Ids) -> None:
        """Each group holds what the item's tokens may see, and slots for little more than that."""
        num_slots = item.kv.num_computed + item.kv.num_tokens
        content = expected_content(owner, num_slots, guesses)
        num_self = len(self.at[Site.DECODER_SELF])
        for slots, group in zip(item.kv.slots[:num_self], self.at[Site.DECODER_SELF], strict=True):
            visible = min(num_slots, item.kv.num_tokens - 1 + (group.window or num_slots))
            found = self.found(group, slots[-visible:].tolist())
            assert found == [(group.number, each) for each in content[-visible:]]
            assert len(slots) <= (group.window or num_slots) + BLOCK_SIZE * group.max_blocks
        if not self.at[Site.DECODER_CROSS]:
            assert item.reads is None
            return
        assert owner.source is not None
        assert item.reads == owner.source.id
        content = prefix_content(owner, Site.DECODER_CROSS) + source_content(owner.source)
        for slots, group in zip(item.kv.slots[num_self:], self.at[Site.DECODER_CROSS], strict=True):
            assert self.found(group, slots.tolist()) == [(group.number, each) for each in content]


def check_heads(owners: Iterable[Sequence | Prefix], contexts: Iterable[Context]) -> None:
    """Contexts with a head of the same id begin with the same slots: the prefix's of this id."""
    slots_of: dict[int, Ids] = {}
    for owner, context in zip(owners, contexts, strict=True):
        if context.heads:
            assert isinstance(owner, Sequence)
            assert [*context.heads] == [(prefix.id, prefix.end_slot) for prefix in owner.prefixes]
        for id_, num_slots in context.heads:
            assert num_slots < len(context.slots)
            shared = tuple(context.slots[:num_slots].tolist())
            assert slots_of.setdefault(id_, shared) == shared


class Machine(RuleBasedStateMachine):
    """Everything but the requests."""

    shape = GEOMETRY

    def __init__(self) -> None:
        super().__init__()
        self.parked: list[Sequence] = []
        self.scheduler = self.new_scheduler()
        self.device = Device(self.scheduler.residency.blocks.groups)
        self.sequences: dict[str, Sequence] = {}
        self.scheduler.residency.held.max_held = 4
        self.ended: set[str] = set()
        self.to_continue: list[Sequence] = []  # those to be held, ended or not
        self.number = 0

    def new_scheduler(self) -> Scheduler:
        return new_scheduler(self.shape)

    def submit_request(self, request: Request) -> None:
        try:
            self.scheduler.residency.check_fits(request)
        except RequestTooLong:
            return
        request = self.scheduler.residency.aligned(request)
        sequence = Sequence(request, prefix_keys(request, self.shape))
        self.sequences[request.id] = sequence
        self.to_continue += [sequence] * request.is_held
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

    @rule(data=st.data())
    @precondition(lambda self: len(self.to_continue) > 3)
    def release(self, data: st.DataObject) -> None:
        sequence = self.to_continue.pop(data.draw(st.integers(0, len(self.to_continue) - 1)))
        sequence.is_held = False
        self.scheduler.residency.held.drop(sequence.request.id)

    @rule(
        fate=st.sampled_from(["go on", "go on", "go on", "stop", "nan"]),
        pick=st.integers(0, 5),
        late=st.sets(st.integers(0, 5), max_size=3),
        leaving=st.sets(st.integers(0, 5), max_size=2),
        failing=st.sets(st.integers(0, 5), max_size=2),
        plans_ahead=st.booleans(),
        num_runs=st.sampled_from([1, 1, 2]),
        num_right=st.integers(0, 4),
    )
    def step(
        self,
        fate: str,
        pick: int,
        late: set[int],
        leaving: set[int],
        failing: set[int],
        plans_ahead: bool,
        num_runs: int = 1,
        num_right: int = 1,
    ) -> None:
        """One step. Rows that are `leaving` end while it runs, those that are `failing` with it, unrun.

        No token can be chosen for `late` ones yet. Of each row's guesses the first `num_right` are right.
        """
        step = self.scheduler.schedule()
        self.parked += self.scheduler.take_loads()
        self.check_plan(step)
        plan = step.plan()
        order = [step.owners[item.id] for item in plan.items if item.sampling]
        sampling = [owner for owner in order if isinstance(owner, Sequence)]
        failed = {sampling[i].id for i in failing if i < len(sampling)}
        for _ in range(num_runs):  # as a step does that failed
            self.device.run(step, plan.part({*step.owners} - failed))
        step.note_failures(plan, failed)
        for sequence in [each for each in sampling if each.id in failed]:
            sequence.is_held = False
            self.end(sequence.request.id, by_caller=True)
        sampling = [sequence for sequence in sampling if sequence.id not in failed]
        for sequence in [sampling[i] for i in leaving if i < len(sampling)]:
            self.end(sequence.request.id, by_caller=True)
        if plans_ahead:
            self.scheduler.plan_ahead(step)
            self.scheduler.check_integrity()
        tokens = [SampledToken(50 + i, -1.0, True) for i in range(len(sampling))]
        if sampling and fate != "go on":
            tokens[pick % len(tokens)] = SampledToken(STOP_ID, -1.0, fate == "stop")
        tokens = [token._replace(is_late=i in late) for i, token in enumerate(tokens)]
        staying = [sequence for sequence in sampling if sequence.phase is Phase.RUNNING]
        waiting = [sampling[i] for i in late if i < len(sampling) and sampling[i] in staying]
        before = [list(sequence.tokens) for sequence in waiting]
        result = StepResult(
            {
                row.id: after_guesses(token, step.guesses.get(row.id, ()), num_right)
                for row, token in zip(sampling, tokens, strict=True)
            }
        )
        news = self.scheduler.update(step, result, 0.0)
        assert {id(sequence) for sequence, _ in news} == {id(each) for each in staying if each not in waiting}
        for sequence, its_tokens in zip(waiting, before, strict=True):
            assert (sequence.tokens, sequence.num_pending) == (its_tokens, 1)
        for sequence, output in news:
            if isinstance(output, PromptplexError) or output.is_last:
                self.end(sequence.request.id, by_caller=False)

    def check_plan(self, step: Step) -> None:
        plan = step.plan()
        sizes = [item.kv.num_tokens for item in plan.items]
        read = {item.reads for item in plan.items}
        assert all(source.id in read for source in plan.sources), "cross-attention runs where sources are new"
        lengths = [source.kv.num_tokens for source in plan.sources]
        assert sum(sizes) + sum(lengths[1:]) <= TOKEN_BUDGET, "only the first source may be longer"
        assert len(self.scheduler.running) <= MAX_ROWS
        assert sizes == sorted(sizes, key=lambda size: size > 1), "rows of one token come first"
        for item in plan.items:
            sequence = step.owners[item.id]
            if isinstance(sequence, Sequence):
                assert all(prefix.is_ready for prefix in sequence.prefixes), "a row runs on what isn't there"
                assert item.stands_on == tuple(prefix.id for prefix in sequence.prefixes)
                first, begin = sequence.request.num_prefix_slots, num_positions(sequence.prefixes)
                assert len(item.token_ids) + item.follows == item.kv.num_tokens
            else:
                above = []
                while (parent := (above[-1] if above else sequence).parent) is not None:
                    above.append(parent)
                first, begin = sequence.first_slot, num_positions(above)
                assert item.soft_from == item.kv.num_computed - first
            assert item.position == begin + item.kv.num_computed - first
        for number, group in enumerate(group_layers(self.shape.layers)):
            if group.site is Site.DECODER_SELF:
                contexts = contexts_of([item.kv for item in plan.items], number, group)
                check_heads([step.owners[item.id] for item in plan.items], contexts)

    def end(self, request_id: str, *, by_caller: bool) -> None:
        sequence = self.sequences.pop(request_id)
        assert request_id not in self.ended, "a request ends once"
        self.ended.add(request_id)
        if by_caller:
            self.scheduler.finish(sequence, is_done=True)
        assert sequence.phase is Phase.FINISHED
        assert sequence.table is None
        assert sequence.source is None

    @invariant()
    def nothing_is_lost(self) -> None:
        self.scheduler.check_integrity()
        rows = (*self.scheduler.running, *self.scheduler.waiting, *self.scheduler.loading)
        assert {id(row.leader) for row in rows} == {id(each) for each in self.sequences.values()}
        held = [sequence for sequence in self.sequences.values() if sequence.prompts]
        assert all(each.phase in (Phase.LOADING, Phase.WAITING) for each in held), (
            "bytes are let go at admission"
        )

    def go_on(self) -> None:
        """One step in which nothing special happens."""
        self.step("go on", 0, set(), set(), set(), plans_ahead=True)

    def teardown(self) -> None:
        """Whatever the state, everything ends when prompts arrive and steps go on."""
        for _ in range(5000):
            if not self.sequences:
                break
            while self.parked:
                sequence = self.parked.pop()
                for digest in sorted(sequence.awaited) if sequence.phase is Phase.LOADING else ():
                    self.scheduler.loaded(sequence, next(each for each in PROMPTS if each.digest == digest))
            self.go_on()
            self.scheduler.check_integrity()
        assert not self.sequences, "every accepted request ends"
        residency = self.scheduler.residency
        for held in [*residency.held]:
            residency.held.drop(held.request.id)
        self.scheduler.check_integrity()
        assert all(not prefix.pins and prefix.is_kept for prefix in residency.prefixes)


class CausalMachine(Machine):
    @rule(
        prompts=st.lists(st.sampled_from(CAUSAL_PROMPTS), max_size=2),
        num_resident=st.sampled_from([0, 0, 1, 6]),
        num_transient=st.sampled_from([0, 0, 10]),
        num_tokens=st.integers(1, 30),
        max_new_tokens=st.integers(1, 20),
        tenant=st.sampled_from(["a", "b"]),
        is_held=st.booleans(),
    )
    def submit(
        self,
        prompts: list[Prompt],
        num_resident: int,
        num_transient: int,
        num_tokens: int,
        max_new_tokens: int,
        tenant: str,
        is_held: bool,
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
            is_held=is_held,
        )
        self.submit_request(request)

    @rule(
        data=st.data(),
        num_new=st.integers(1, 12),
        num_transient=st.sampled_from([0, 0, 5]),
        is_cut_anew=st.booleans(),
        is_held=st.booleans(),
    )
    @precondition(lambda self: len(self.scheduler.residency.held) > 0)
    def continue_one(
        self, data: st.DataObject, num_new: int, num_transient: int, is_cut_anew: bool, is_held: bool
    ) -> None:
        """A request begins with some of another one's text; its transient segments may be others."""
        held = self.scheduler.residency.held
        other = data.draw(st.sampled_from([each for each in self.to_continue if held.get(each.request.id)]))
        self.number += 1
        common = other.tokens[: len(other.tokens) - data.draw(st.sampled_from([0, 0, 1, 2, 9]))]
        ids = (*common, *(1000 * self.number + i for i in range(num_new)))
        segments, kept = other.request.segments, other.request.num_kept_segments
        if is_cut_anew:
            ids = (*(id_ for segment in segments[kept:] for id_ in segment.token_ids), *ids)
            num_transient = min(num_transient, len(ids) - 1)
            shared = Segment(token_ids=ids[:num_transient], is_kept=False)
            segments, ids = segments_of(*segments[:kept], shared), ids[num_transient:]
        self.submit_request(
            replace(
                other.request,
                id=str(self.number),
                segments=segments,
                token_ids=ids,
                is_held=is_held,
                continues=other.request.id,
            )
        )


class EncoderDecoderMachine(Machine):
    shape = WITH_ENCODER

    def __init__(self) -> None:
        super().__init__()
        self.last: Request | None = None

    @rule(
        prefixes=st.lists(st.sampled_from(sorted(PREFIXES)), max_size=2),
        soft=st.sampled_from([(), (), ("soft",), ("one",)]),
        encoder_soft=st.sampled_from([None, None, "soft", "one"]),
        num_shared=st.sampled_from([0, 0, 10]),
        num_tokens=st.integers(1, 6),
        num_read=st.integers(0, 40),
        max_new_tokens=st.integers(1, 20),
    )
    def submit(
        self,
        prefixes: list[str],
        soft: tuple[str, ...],
        encoder_soft: str | None,
        num_shared: int,
        num_tokens: int,
        num_read: int,
        max_new_tokens: int,
    ) -> None:
        self.number += 1
        by_name = {each.digest: each for each in PROMPTS}
        rows = 0 if encoder_soft is None else by_name[encoder_soft].num_virtual_tokens
        source = Input(
            id=f"source {self.number}",
            token_ids=tuple(range(num_read if rows else num_read + 1)),
            prompt_digest=encoder_soft,
            num_virtual_tokens=rows,
        )
        self.last = Request(
            id=str(self.number),
            token_ids=tuple(1000 * self.number + i for i in range(num_tokens)),
            segments=segments_of(
                *map(prefix_of, prefixes),
                *(replace(learned(by_name[name]), is_kept=False) for name in soft),
                Segment(token_ids=tuple(range(num_shared)), is_kept=False),
            ),
            source=source,
            max_new_tokens=max_new_tokens,
            stop_ids=frozenset({STOP_ID}),
        )
        self.submit_request(self.last)

    @rule(max_new_tokens=st.integers(1, 20))
    @precondition(lambda self: self.last)
    def submit_another_sample(self, max_new_tokens: int) -> None:
        assert self.last is not None
        self.number += 1
        self.submit_request(replace(self.last, id=str(self.number), max_new_tokens=max_new_tokens))


class FullMachine(CausalMachine):
    """Without windows, which give back what others could reuse."""

    shape = geometry(DECODER_SELF=(FULL,))


TestScheduler = CausalMachine.TestCase
TestScheduler.settings = settings(
    max_examples=100, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
TestSchedulerWithoutWindows = FullMachine.TestCase
TestSchedulerWithoutWindows.settings = settings(TestScheduler.settings, max_examples=60)
TestEncoderDecoderScheduler = EncoderDecoderMachine.TestCase
TestEncoderDecoderScheduler.settings = settings(TestScheduler.settings, max_examples=60)


def test_what_can_never_fit_is_refused_and_what_just_fits_is_not() -> None:
    scheduler = new_scheduler()
    capacity, limit = (count * BLOCK_SIZE for count in (NUM_BLOCKS, NUM_BLOCKS + NUM_WINDOW_BLOCKS))
    just_fits = Request(id="a", token_ids=(1,) * (capacity - 10), max_new_tokens=10)
    scheduler.residency.check_fits(just_fits)
    too_long = Request(id="b", token_ids=(1,) * (capacity - 10), max_new_tokens=11)
    with pytest.raises(RequestTooLong, match=f"the server has {limit}"):
        scheduler.residency.check_fits(too_long)


def test_a_request_that_fills_the_memory_runs_when_idle_prefixes_must_go() -> None:
    scheduler = new_scheduler()
    soft = PROMPTS[2]
    first = Request(id="1", token_ids=(1, 2), max_new_tokens=1, segments=(learned(PROMPTS[2]),))
    sequence = Sequence(first, prefix_keys(first, GEOMETRY))
    scheduler.add(sequence)
    scheduler.loaded(scheduler.take_loads()[0], soft)
    while sequence.phase is not Phase.FINISHED:
        step = scheduler.schedule()
        tokens = [SampledToken(5, 0.0, True) for item in step.items if item.sampling]
        scheduler.update(step, result_of(step, tokens), 0.0)
    assert [prefix.is_ready for prefix in scheduler.residency.prefixes] == [True], (
        "it stays for the next request"
    )
    huge = Request(id="2", token_ids=(1,) * (NUM_BLOCKS * BLOCK_SIZE - 1), max_new_tokens=1)
    giant = Sequence(huge)
    scheduler.add(giant)
    scheduler.schedule()
    assert giant.phase is Phase.RUNNING
    assert len(scheduler.residency.prefixes) == 0
    scheduler.check_integrity()


def reading(number: int, num_read: int, **settings: object) -> Sequence:
    source = Input(id=f"source {number}", token_ids=tuple(range(num_read)))
    request = Request(id=str(number), token_ids=(1,), source=source, max_new_tokens=5, **settings)  # type: ignore[arg-type]
    return Sequence(request, prefix_keys(request, WITH_ENCODER))


def advance(scheduler: Scheduler) -> Step:
    step = scheduler.schedule()
    tokens = [SampledToken(5, 0.0, True) for item in step.items if item.sampling]
    scheduler.update(step, result_of(step, tokens), 0.0)
    return step


def test_sources_beyond_the_budget_come_first_in_their_steps_and_decoding_rows_go_along() -> None:
    scheduler = new_scheduler(WITH_ENCODER)
    for number, num_read in enumerate((3, 20, 8, 30, 5)):
        scheduler.add(reading(number, num_read))
    steps = [advance(scheduler) for _ in range(4)]
    assert [[*each.sources] and [s.input.num_slots for s in each.sources.values()] for each in steps] == [
        [3, 8],
        [20],
        [30],
        [5],
    ]
    assert [step.counts.decode_rows for step in steps] == [0, 2, 3, 4]
    assert [step.counts.encoder_tokens for step in steps] == [11, 20, 30, 5]


def test_a_source_is_encoded_again_for_those_who_wait_where_its_only_reader_failed() -> None:
    scheduler = new_scheduler(WITH_ENCODER)
    first, broken = reading(0, 3), reading(1, 20)
    waiting = Sequence(replace(broken.request, id="waiting"), broken.prefix_keys)
    for sequence in (first, broken, waiting):
        scheduler.add(sequence)
    advance(scheduler)
    assert waiting.source is broken.source is not None, (
        "placed, but the source doesn't fit beside the first one"
    )
    step = scheduler.schedule()
    assert [item.id for item in step.items if item.reads == waiting.reads] == [broken.id]
    step.note_failures(step.plan(), {broken.id})
    scheduler.finish(broken)
    scheduler.update(step, StepResult({first.id: (SampledToken(5, 0.0, True),)}), 0.0)
    assert [*advance(scheduler).sources.values()] == [waiting.source]
    scheduler.check_integrity()


def test_encoder_tokens_are_charged_once_for_all_samples() -> None:
    """Fair share: a tenant with long sources waits for one with short ones; samples share what they read."""
    scheduler = new_scheduler(WITH_ENCODER)
    first = reading(0, 10, tenant="long")
    scheduler.add(first)
    advance(scheduler)
    again = replace(first.request, id="again")
    scheduler.add(Sequence(again, first.prefix_keys))
    scheduler.add(reading(2, 1, tenant="short"))
    charged = scheduler.waiting._tenants._served
    assert charged["long"] == 1 + 10 + 1, "its token, its source, and the first token of the answer"
    advance(scheduler)
    assert charged["long"] == 1 + 10 + 1 + 1 + 1 + 1, "the sample costs its own tokens only"
    assert charged["short"] >= 1 + 1


def test_blocks_that_are_freed_while_a_row_needs_them_are_noticed() -> None:
    scheduler = new_scheduler(WITH_ENCODER)
    row = reading(0, 9)
    scheduler.add(row)
    advance(scheduler)
    scheduler.check_integrity()
    assert row.source is not None
    scheduler.residency.sources.let_go(row.source)
    with pytest.raises(AssertionError, match="sources and their users differ"):
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
    assert scheduler.update(step, StepResult({sequence.id: (late,)}, {sequence.id: scores}), 0.0) == []
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
