"""What runs next. `schedule()` decides a step, `plan_ahead(step)` works while it runs, `update` applies it.

The order of a step: decoding rows first (they were promised), then prefill of what was admitted,
then admission by fair share, all under one token budget. A prefix that is missing is built in
the same step as the prefill that needs it, where the budget allows. A source is encoded in the step that
takes the first tokens that read it.

`schedule` counts a step's tokens as computed at once, since a Plan always runs (what can't run ends,
engine/isolation.py). `update` takes one back where nothing could be chosen after it yet. Sequences may end
while a step runs: what they held can be given to the next step, since the executor runs Plans in order.

Nothing can deadlock: a sequence that waits holds no pin and no block, so the oldest running one
can always have everything else's (docs/architecture.md, "Preempted rows hold nothing").
"""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest

from app.engine.beam_rows import advance
from app.engine.blocks import KVBlocks
from app.engine.fair_queue import FairQueue, Party
from app.engine.items import decode_item
from app.engine.plan import StepResult
from app.engine.prefill import prefill
from app.engine.residency import Residency
from app.engine.router import Output
from app.engine.sampling.inputs import SampledToken
from app.engine.sequence import BeamGroup, Phase, Sequence
from app.engine.speculation import Speculation
from app.engine.step import Step, StepCounts
from app.errors import NonFiniteLogits, PromptplexError
from app.models.attention.metadata import PackedItem
from app.prompt import Prompt
from app.request import FinishReason, TokenDelta, TokenScore


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Bounds of a step."""

    max_rows: int  # sequences that run at once
    token_budget: int  # tokens of one forward pass
    speculate: int = 0  # tokens that are guessed at once for a row, at most

    def __post_init__(self) -> None:
        if not 1 <= self.max_rows <= self.token_budget:
            raise ValueError(
                f"token_budget ({self.token_budget}) must be at least max_rows ({self.max_rows}), "
                "since every running row takes a token a step"
            )


class Scheduler:
    """Owns every sequence, block and prefix. Called by one thread only."""

    def __init__(self, blocks: KVBlocks, config: SchedulerConfig) -> None:
        self.residency = Residency(blocks)
        self.running: list[Sequence] = []  # in order of admission
        self.waiting = FairQueue()
        self.loading: set[Sequence] = set()
        self._searches: set[BeamGroup] = set()  # that run
        self._ahead: dict[int, PackedItem] = {}  # of rows that decode in the next step, by id
        self._served: dict[Party, int] = {}  # tokens of the step whose result is being applied
        self._to_load: list[Sequence] = []  # parked since `take_loads` was asked last
        self._speculation = Speculation(blocks, config.speculate)
        self._config = config

    @property
    def num_open(self) -> int:
        return len(self.running) + len(self.waiting) + len(self.loading)

    def add(self, sequence: Sequence) -> None:
        """Take in a new sequence. Prompts of sequences that come next are fetched at once."""
        self.residency.prefixes.expect(sequence.transient_keys)
        if self.residency.missing_prompts(sequence) and self.num_open < self._config.max_rows:
            self._park(sequence)
        else:
            self.waiting.push(sequence)

    def take_loads(self) -> list[Sequence]:
        """Return the sequences parked since the last call: fetch their prompts, then call `loaded`."""
        parked, self._to_load = self._to_load, []
        return parked

    def loaded(self, sequence: Sequence, prompt: Prompt) -> None:
        """Take in one of a parked sequence's prompts; with the last one it waits for its turn again."""
        sequence.prompts[prompt.digest] = prompt
        sequence.awaited.discard(prompt.digest)
        if sequence.awaited:
            return
        self.loading.discard(sequence)
        sequence.phase = Phase.WAITING
        self.waiting.push(sequence, front=sequence.admitted is not None)

    def finish(self, sequence: Sequence, *, is_done: bool = False) -> None:
        """Free everything that a sequence and all rows beside it hold, in whatever phase they are.

        Of one that `is_done` and is to be held, keys and values stay.
        """
        if sequence.phase is Phase.RUNNING:
            self._leave(sequence, Phase.FINISHED, is_done=is_done)
        elif sequence.phase is Phase.WAITING:
            self.waiting.remove(sequence.leader)
        self.loading.discard(sequence)
        if sequence.constraint is not None:
            sequence.constraint.drop()
            sequence.constraint = None
        for row in sequence.rows:
            row.phase = Phase.FINISHED
        self.residency.prefixes.forget(sequence.transient_keys)

    def _leave(self, sequence: Sequence, phase: Phase, *, is_done: bool = False) -> None:
        """Take back what a running sequence holds, and all rows beside it."""
        for row in sequence.rows:
            self.running.remove(row)
            self.residency.vacate(row, is_done=is_done)
            row.phase = phase
        if sequence.beams is not None:
            self._searches.remove(sequence.beams)

    # -- schedule ---------------------------------------------------------------------------

    def schedule(self) -> Step:
        """Decide one step."""
        if self.residency.prefixes.built:
            self.residency.prefixes.trim()
        step = Step(self._config.token_budget)
        for sequence in [sequence for sequence in self.running if sequence.is_decoding]:
            if sequence.phase is Phase.RUNNING and self._decode(sequence, step):
                step.counts.decode_rows += 1
        self._ahead.clear()
        if self._searches:
            step.counts.beam_rows = sum(row.beams is not None for row in step.sequences.values())
        for sequence in [sequence for sequence in self.running if sequence.num_pending]:
            prefill(sequence, step, self.residency.prefixes)
        if not step.counts.preempted:
            self._admit(step)
            self._speculation.extend(step, len(self.running))
        if self._searches or self.residency.held.lenders:  # nothing else forks tables
            step.counts.copied_blocks = self.residency.blocks.num_copies
            step.copies = self.residency.blocks.take_copies()
            self.residency.held.lenders.clear()
        return step

    def plan_ahead(self, step: Step) -> None:
        """While a step runs, make room for the tokens that its rows take through the model next.

        Only free blocks are taken: evicting, preempting and admitting wait until the step's tokens are
        known, so that every decision is the same as if nothing had been planned ahead. Beams wait too.
        """
        for id_, sequence in step.sequences.items():
            if not sequence.goes_on:
                continue
            assert sequence.table is not None
            slot = sequence.next_slot
            if not sequence.table.grow(slot, slot + 1):
                return
            self._ahead[id_] = sequence.kv(slot, 1)

    def _decode(self, sequence: Sequence, step: Step) -> bool:
        """Plan the one pending token of a row; False where the row itself had to be preempted."""
        slot = sequence.next_slot
        kv = self._ahead.get(sequence.id)
        if kv is None or kv.num_computed != slot:  # a late row takes its last token again
            if not self._grow(sequence, step):
                return False
            kv = sequence.kv(slot, 1)
        step.add(sequence, decode_item(sequence, kv))
        sequence.num_computed += 1
        return True

    def _grow(self, sequence: Sequence, step: Step) -> bool:
        """Make room for one more slot, at the cost of what is idle, then of the youngest sequence.

        All rows beside it get theirs too, since they go together. Return False where the youngest is the
        sequence itself.
        """
        for row in sequence.rows:
            assert row.table is not None
            start, end = row.pending_slots
            while not row.table.grow(start, end):
                if self.residency.make_room(row.table.missing_blocks(start, end)):
                    continue
                self._preempt(self.running[-1], step)
                if sequence.phase is not Phase.RUNNING:
                    return False
        return True

    def _preempt(self, sequence: Sequence, step: Step) -> None:
        """Take everything back; the sequence recomputes its keys and values when it is readmitted."""
        self._leave(sequence, Phase.WAITING)
        for row in sequence.rows:
            row.num_computed = 0
        if sequence.beams is not None:
            sequence.beams.results.clear()
        self.waiting.push(sequence.leader, front=True)
        step.counts.preempted += 1

    # -- admission --------------------------------------------------------------------------

    def _admit(self, step: Step) -> None:
        while step.budget:
            sequence = self.waiting.peek()
            if sequence is None:
                return
            num_rows = len(self.running) + sum(each.num_missing for each in self._searches)
            if num_rows + sequence.num_rows > self._config.max_rows:
                return
            if self.residency.missing_prompts(sequence):
                if len(self.loading) >= self._config.max_rows:  # prompts take memory too
                    return
                self.waiting.remove(sequence)
                self._park(sequence)
            # While others run, a block for each of them stays free, so that admission doesn't preempt.
            elif self.residency.place(sequence, num_rows, step.counts):
                self._start(sequence)
                for row in sequence.rows:
                    prefill(row, step, self.residency.prefixes)
            else:
                return

    def _park(self, sequence: Sequence) -> None:
        sequence.awaited = self.residency.missing_prompts(sequence)
        sequence.phase = Phase.LOADING
        self.loading.add(sequence)
        self._to_load.append(sequence)

    def _start(self, sequence: Sequence) -> None:
        self.waiting.take(sequence)
        for row in sequence.rows:
            row.phase = Phase.RUNNING
            self.running.append(row)
        if sequence.beams is not None:
            self._searches.add(sequence.beams)
        if sequence.constraint is not None:
            sequence.constraint.begin()
        if sequence.admitted is None:  # recomputing after a preemption is not charged
            self.waiting.charge(sequence.party, sequence.num_pending + _new_shared_tokens(sequence))
            sequence.admitted = time.monotonic()

    # -- update -----------------------------------------------------------------------------

    def update(self, step: Step, result: StepResult, now: float) -> list[tuple[Sequence, Output]]:
        """Apply a step's result; sequences that end free what they hold. A late row has no output."""
        outputs: list[tuple[Sequence, Output]] = []
        for source in step.sources.values():
            source.prompt = None if source.is_encoded else source.prompt
        for id_, sequence in step.sequences.items():
            if sequence.phase is not Phase.RUNNING:
                continue
            if id_ in result.scores:
                sequence.scores += result.scores[id_]
            tokens = result.tokens.get(id_)
            if tokens is None:
                if sequence.is_all_scored:
                    outputs.append((sequence, self._end_scored(sequence, (), now)))
                continue
            if sequence.beams is not None:
                outputs += self._take_beam(sequence, tokens[0], step.counts, now)
            elif tokens[0].is_late and id_ not in step.errors:
                sequence.num_computed -= 1  # taken again with the next step, to the same slot
            else:
                outputs += self._take(sequence, tokens, step, now)
        for party, num_tokens in self._served.items():
            self.waiting.charge(party, num_tokens)
        self._served.clear()
        return outputs

    def _take(
        self, sequence: Sequence, tokens: tuple[SampledToken, ...], step: Step, now: float
    ) -> list[tuple[Sequence, Output]]:
        """Take a row's next token, and each further one whose guess was the token before it."""
        outputs: list[tuple[Sequence, Output]] = []
        guesses = step.guesses.get(sequence.id, ())
        for token, guess in zip_longest(tokens, guesses):
            error = step.errors.get(sequence.id, token.error)
            outputs.append((sequence, self._accept(sequence, token, error, step.counts, now)))
            if sequence.phase is not Phase.RUNNING or token.token_id != guess:
                break
            sequence.num_computed += 1
        if guesses:
            step.counts.accepted += len(outputs) - 1
            sequence.lookup.learn(len(outputs) - 1, len(guesses))
        return outputs

    def _accept(
        self,
        sequence: Sequence,
        token: SampledToken,
        error: PromptplexError | None,
        counts: StepCounts,
        now: float,
    ) -> Output:
        scores = () if sequence.num_generated else tuple(sequence.scores)
        if not token.is_finite or (scores and _has_nan(scores)):
            error = _not_finite()
        if error is not None:
            self.finish(sequence)
            return error
        if sequence.request.max_new_tokens == 0:
            return self._end_scored(sequence, token.top, now)
        reason = sequence.accept(token.token_id, now)
        self._served[sequence.party] = self._served.get(sequence.party, 0) + 1
        is_first = sequence.num_generated == 1
        (counts.first_token_latencies if is_first else counts.inter_token_latencies).append(sequence.latency)
        if reason is None:
            return TokenDelta(token.token_id, token.logprob, token.top, scores)
        self.finish(sequence, is_done=True)
        return TokenDelta(
            token.token_id, token.logprob, token.top, scores, finish=reason, timings=sequence.timings(now)
        )

    def _end_scored(self, sequence: Sequence, top: tuple[tuple[int, float], ...], now: float) -> Output:
        """End what generates nothing; `top` are the most probable tokens after its prompt, if wanted."""
        is_finite = not _has_nan(sequence.scores)
        self.finish(sequence, is_done=is_finite)
        if not is_finite:
            return _not_finite()
        scores, timings = tuple(sequence.scores), sequence.timings(now)
        return TokenDelta(top=top, scores=scores, finish=FinishReason.LENGTH, timings=timings)

    def _take_beam(
        self, row: Sequence, token: SampledToken, counts: StepCounts, now: float
    ) -> list[tuple[Sequence, Output]]:
        """Take a row's candidates; with those of the last row, its group goes on or ends."""
        leader, group = row.leader, row.beams
        assert group is not None
        if not token.is_finite or _has_nan(row.scores):
            self.finish(row)
            return [(leader, _not_finite())]
        group.results[row.id] = token
        if len(group.results) < len(group.rows):
            return []
        self.waiting.charge(leader.party, len(group.rows))
        output = advance(group, self.running, self.residency, now)
        if isinstance(output, PromptplexError) or output.is_last:
            self.finish(leader)
        if isinstance(output, TokenDelta) and output.hypotheses:
            counts.searched_tokens += len(output.hypotheses[0].tokens)
        return [(leader, output)]

    def check_integrity(self) -> None:
        """Assert that blocks, slots, pins and phases are conserved; run at idle and between test steps."""
        self.residency.check_integrity(self.running)
        for sequence in self.waiting:
            assert sequence.phase is Phase.WAITING
            assert sequence.table is None
            assert not sequence.prefixes
            assert sequence.source is None
        assert all(sequence.phase is Phase.RUNNING for sequence in self.running)
        assert all(sequence.phase is Phase.LOADING for sequence in self.loading)


def _new_shared_tokens(sequence: Sequence) -> int:
    """Return the tokens of a source, and of what only requests share that run together, that it begins."""
    begun = (each for each in sequence.prefixes if not (each.is_kept or each.num_computed))
    num_begun, source = sum(each.segment.num_slots for each in begun), sequence.source
    return num_begun + (source.input.num_slots if source is not None and source.users == 1 else 0)


def _has_nan(scores: Iterable[TokenScore]) -> bool:
    return any(math.isnan(score.logprob) for score in scores)


def _not_finite() -> NonFiniteLogits:
    return NonFiniteLogits(
        "the model produced NaN or infinite logits for this request; if it names a task, the task's "
        "prompt is the likely cause: check its values, or roll the task back"
    )
