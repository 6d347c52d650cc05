"""What runs next. `schedule` decides a step, `plan_ahead` works while it runs, `update` applies it.

The order of a step: decoding rows first (they were promised), then prefill of what was admitted,
then admission by fair share, all under one token budget. A prefix that is missing is built in
the same step as the prefill that needs it, where the budget allows. A source is encoded in the step that
takes the first tokens that read it.

Where more than one step may be under way, the next one is scheduled before the tokens of the last are known:
a row whose token is under way goes on after it, to be dropped if that token ends the answer.

`schedule` counts a step's tokens as computed at once, since a Plan always runs (what can't run ends,
engine/isolation.py). `update` takes one back where nothing could be chosen after it yet. Sequences may end
while a step runs: what they held can be given to the next step, since the executor runs Plans in order.

Nothing can deadlock: a sequence that waits holds no pin and no block, so the oldest running one
can always have everything else's (docs/architecture.md, "Preempted rows hold nothing").
"""

import time
from dataclasses import dataclass
from itertools import zip_longest

from app.engine.acceptance import accept, end_scored, has_nan, not_finite
from app.engine.beam_rows import advance
from app.engine.blocks import KVBlocks
from app.engine.fair_queue import FairQueue, Party
from app.engine.items import decode_item
from app.engine.plan import StepResult
from app.engine.prefill import prefill
from app.engine.recovery import drop_prefixes, go_back
from app.engine.residency import Residency
from app.engine.router import Output
from app.engine.sampling.inputs import SampledToken
from app.engine.sequence import BeamGroup, Phase, Sequence
from app.engine.speculation import Speculation
from app.engine.step import Step, StepCounts
from app.errors import PromptplexError
from app.models.attention.metadata import PackedItem
from app.prompt import Prompt
from app.request import TokenDelta


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Bounds of a step."""

    max_rows: int  # sequences that run at once
    token_budget: int  # tokens of one forward pass
    speculate: int = 0  # tokens that are guessed at once for a row, at most
    steps_in_flight: int = 1  # steps that are scheduled before the first of them is applied, at most

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
        self._under_way: list[Step] = []  # scheduled and not applied yet
        # Open requests that were in a step which failed ahead of another one, until they get a token again.
        self._suspects: set[Sequence] = set()
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
        self._suspects.discard(sequence.leader)
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
        self._disown(sequence)
        if sequence.beams is not None:
            self._searches.remove(sequence.beams)

    def _disown(self, sequence: Sequence) -> None:
        """Drop what steps under way choose for a sequence and all rows beside it."""
        for step in self._under_way:
            step.left.update(row.id for row in sequence.rows)

    # -- schedule ---------------------------------------------------------------------------

    @property
    def may_go_ahead(self) -> bool:
        """Whether a step can be scheduled now, before those under way are applied.

        Not beside beams, since it isn't known which go on, nor where rows take guesses along, which need the
        token before; nor beside what was in a step that failed, which is looked for among single steps.
        """
        if not self._under_way:
            return True
        must_wait = self._searches or self._suspects or self._config.speculate
        return len(self._under_way) < self._config.steps_in_flight and not must_wait

    def schedule(self) -> Step:
        """Decide one step."""
        if self.residency.prefixes.built:
            self.residency.prefixes.trim()
        step = Step(self._config.token_budget)
        for sequence in [row for row in self.running if row.is_decoding or row.goes_on]:
            if sequence.phase is Phase.RUNNING and self._decode(sequence, step):
                step.counts.decode_rows += 1
        self._ahead.clear()
        if self._searches:
            step.counts.beam_rows = sum(row.beams is not None for row in step.sequences.values())
        for sequence in [row for row in self.running if row.num_pending > 0]:
            prefill(sequence, step, self.residency.prefixes)
        if not step.counts.preempted:
            self._admit(step)
            self._speculation.extend(step, len(self.running))
        step.counts.copied_blocks = self.residency.blocks.num_copies
        if step.counts.copied_blocks:  # for forks: of a beam, or of what is held or was until this step
            step.copies = self.residency.blocks.take_copies()
        self.residency.held.lenders.clear()
        if step.items or step.writes:
            self._under_way.append(step)
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
        """Plan the one token that a row takes next; False where the row itself had to be preempted."""
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

    def start_over(self, step: Step) -> None:
        """Undo all steps under way, the first of which failed, and go on with one at a time.

        So it is found out which of their rows is at fault, if any, before others go ahead. Each time takes a
        step that counts: whatever goes on failing, the others get their tokens.
        """
        steps, self._under_way = self._under_way, []
        for row in reversed(go_back(steps, self.running, self.residency)):
            if row.phase is Phase.RUNNING:  # not preempted with a row beside it
                self._preempt(row, step)
        drop_prefixes(steps, self.residency)
        rows = (row.leader for each in steps for row in each.sequences.values())
        self._suspects.update(row for row in rows if row.phase is not Phase.FINISHED)

    def update(self, step: Step, result: StepResult, now: float) -> list[tuple[Sequence, Output]]:
        """Apply a step's result; sequences that end free what they hold. A late row has no output."""
        if step in self._under_way:
            self._under_way.remove(step)
        for source in step.sources.values():
            source.prompt = None if source.is_encoded else source.prompt
        outputs: list[tuple[Sequence, Output]] = []
        for id_, sequence in step.sequences.items():
            if sequence.phase is Phase.RUNNING and id_ not in step.left:
                outputs += self._outputs(sequence, step, result, now)
        if self._suspects:
            self._suspects.difference_update(sequence for sequence, _ in outputs)
        for party, num_tokens in self._served.items():
            self.waiting.charge(party, num_tokens)
        self._served.clear()
        return outputs

    def _outputs(
        self, sequence: Sequence, step: Step, result: StepResult, now: float
    ) -> list[tuple[Sequence, Output]]:
        """Take what a step found for a row, if anything."""
        id_ = sequence.id
        if id_ in result.scores:
            sequence.scores += result.scores[id_]
        tokens = result.tokens.get(id_)
        if tokens is None:
            return [self._hand_out(sequence, end_scored(sequence, (), now))] if sequence.is_all_scored else []
        if sequence.beams is not None:
            return self._take_beam(sequence, tokens[0], step.counts, now)
        if tokens[0].is_late and id_ not in step.errors:
            self._take_again(sequence)
            return []
        if id_ in step.guesses:
            return self._take_guessed(sequence, tokens, step, now)
        return [self._take(sequence, tokens[0], step, now)]

    def _take_again(self, sequence: Sequence) -> None:
        """Let a late row take its last token again, to the same slot; it may have gone ahead of it."""
        sequence.num_computed = len(sequence.tokens) - 1
        self._disown(sequence)

    def _take(
        self, sequence: Sequence, token: SampledToken, step: Step, now: float
    ) -> tuple[Sequence, Output]:
        """Take a row's next token."""
        error = step.errors.get(sequence.id, token.error)
        return self._hand_out(sequence, accept(sequence, token, error, step.counts, now))

    def _take_guessed(
        self, sequence: Sequence, tokens: tuple[SampledToken, ...], step: Step, now: float
    ) -> list[tuple[Sequence, Output]]:
        """Take a row's next token, and each further one whose guess was the token before it."""
        outputs: list[tuple[Sequence, Output]] = []
        guesses = step.guesses[sequence.id]
        for token, guess in zip_longest(tokens, guesses):
            outputs.append(self._take(sequence, token, step, now))
            if sequence.phase is not Phase.RUNNING or token.token_id != guess:
                break
            sequence.num_computed += 1
        step.counts.accepted += len(outputs) - 1
        sequence.lookup.learn(len(outputs) - 1, len(guesses))
        return outputs

    def _hand_out(self, sequence: Sequence, output: Output) -> tuple[Sequence, Output]:
        """Charge a row's token, if that is its output, and end the row where there are no more."""
        if isinstance(output, PromptplexError):
            self.finish(sequence)
            return sequence, output
        if output.token_id is not None:
            self._served[sequence.party] = self._served.get(sequence.party, 0) + 1
        if output.finish is not None:
            self.finish(sequence, is_done=True)
        return sequence, output

    def _take_beam(
        self, row: Sequence, token: SampledToken, counts: StepCounts, now: float
    ) -> list[tuple[Sequence, Output]]:
        """Take a row's candidates; with those of the last row, its group goes on or ends."""
        leader, group = row.leader, row.beams
        assert group is not None
        if not token.is_finite or has_nan(row.scores):
            self.finish(row)
            return [(leader, not_finite())]
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
