"""What runs next. `schedule()` decides a step, `plan_ahead(step)` works while it runs, `update` applies it.

The order of a step: decoding rows first (they were promised), then prefill of what was admitted,
then admission by fair share, all under one token budget. A prefix that is missing is built in
the same step as the prefill that needs it, where the budget allows.

`schedule` counts a step's tokens as computed at once, since a Plan always runs (what can't run ends,
engine/isolation.py). `update` takes one back where nothing could be chosen after it yet. Sequences may end
while a step runs: what they held can be given to the next step, since the executor runs Plans in order.

Nothing can deadlock: a sequence that waits holds no pin and no block, so the oldest running one
can always have everything else's (docs/architecture.md, "Preempted rows hold nothing").
"""

import math
import time
from dataclasses import dataclass

from app.engine.blocks import KVBlocks, SlotTable
from app.engine.fair_queue import FairQueue
from app.engine.items import decode_item, prefill_item, prefix_item
from app.engine.plan import PrefixWrite, StepResult
from app.engine.prefixes import Prefix, PrefixCache
from app.engine.router import Output
from app.engine.sampling.inputs import SampledToken
from app.engine.sequence import Phase, Sequence
from app.engine.step import Step
from app.errors import NonFiniteLogits, PromptplexError, RequestTooLong
from app.models.attention.metadata import PackedItem
from app.prompt import Prompt
from app.request import FinishReason, Request, TokenDelta


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Bounds of a step."""

    max_rows: int  # sequences that run at once
    token_budget: int  # tokens of one forward pass

    def __post_init__(self) -> None:
        if not 1 <= self.max_rows <= self.token_budget:
            raise ValueError(
                f"token_budget ({self.token_budget}) must be at least max_rows ({self.max_rows}), "
                "since every running row takes a token a step"
            )


class Scheduler:
    """Owns every sequence, block and prefix. Called by one thread only."""

    def __init__(self, blocks: KVBlocks, config: SchedulerConfig) -> None:
        self.blocks = blocks
        self.prefixes = PrefixCache(blocks)
        self.running: list[Sequence] = []  # in order of admission
        self.waiting = FairQueue()
        self.loading: set[Sequence] = set()
        self._ahead: dict[int, PackedItem] = {}  # of rows that decode in the next step, by id
        self._to_load: list[Sequence] = []  # parked since `take_loads` was asked last
        self._config = config

    @property
    def num_open(self) -> int:
        return len(self.running) + len(self.waiting) + len(self.loading)

    def check_fits(self, request: Request) -> None:
        """Refuse a request that could not run even alone.

        Raises:
            RequestTooLong: Its keys and values exceed all blocks there are.
        """
        needed = self.blocks.blocks_for(len(request.token_ids) + request.max_new_tokens)
        for segment in request.segments:
            needed += self.blocks.blocks_for(segment.num_slots)
        # No argmax of numpy's: it gives up the GIL, and the device's thread may keep it for a step.
        pairs = zip(needed.tolist(), self.blocks.capacity.tolist(), strict=True)
        asked, limit = (
            count * self.blocks.block_size for count in max(pairs, key=lambda pair: pair[0] - pair[1])
        )
        if asked > limit:
            raise RequestTooLong(
                f"the request needs {asked} K/V slots (prefix {request.num_prefix_slots}, prompt "
                f"{len(request.token_ids)}, new {request.max_new_tokens}), but the server has "
                f"{limit}; ask for fewer new tokens or give the server more K/V memory",
                param="max_new_tokens",
                limit=limit,
                asked=f"{asked} tokens",
            )

    def add(self, sequence: Sequence) -> None:
        """Take in a new sequence. Prompts of sequences that come next are fetched at once."""
        if self._missing_prompts(sequence) and self.num_open < self._config.max_rows:
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

    def finish(self, sequence: Sequence) -> None:
        """Free everything that a sequence holds, in whatever phase it is."""
        if sequence.phase is Phase.RUNNING:
            self.running.remove(sequence)
            self._vacate(sequence)
        elif sequence.phase is Phase.WAITING:
            self.waiting.remove(sequence)
        self.loading.discard(sequence)
        if sequence.constraint is not None:
            sequence.constraint.drop()
            sequence.constraint = None
        sequence.phase = Phase.FINISHED

    # -- schedule ---------------------------------------------------------------------------

    def schedule(self) -> Step:
        """Decide one step."""
        self.prefixes.trim()
        step = Step(self._config.token_budget)
        for sequence in [sequence for sequence in self.running if sequence.is_decoding]:
            if sequence.phase is Phase.RUNNING and self._decode(sequence, step):
                step.counts.decode_rows += 1
        self._ahead.clear()
        for sequence in [sequence for sequence in self.running if sequence.num_pending]:
            self._prefill(sequence, step)
        if not step.counts.preempted:
            self._admit(step)
        return step

    def plan_ahead(self, step: Step) -> None:
        """While a step runs, make room for the tokens that its rows take through the model next.

        Only free blocks are taken: evicting, preempting and admitting wait until the step's tokens are
        known, so that every decision is the same as if nothing had been planned ahead.
        """
        for sequence in step.sequences():
            if sequence.phase is not Phase.RUNNING or sequence.num_pending or sequence.is_last_token_next:
                continue
            assert sequence.table is not None
            slot, _ = sequence.pending_slots
            if not sequence.table.grow(slot, slot + 1):
                return
            self._ahead[sequence.id] = PackedItem(slot, 1, sequence.table.slots(slot + 1))

    def _decode(self, sequence: Sequence, step: Step) -> bool:
        """Plan the one pending token of a row; False where the row itself had to be preempted."""
        slot, _ = sequence.pending_slots
        kv = self._ahead.get(sequence.id)
        if kv is None or kv.num_computed != slot:  # a late row takes its last token again
            if not self._grow(sequence, step):
                return False
            assert sequence.table is not None
            kv = PackedItem(slot, 1, sequence.table.slots(slot + 1))
        step.add(sequence, decode_item(sequence, kv))
        sequence.num_computed += 1
        return True

    def _grow(self, sequence: Sequence, step: Step) -> bool:
        """Make room for one more slot, at the cost of idle prefixes, then of the youngest sequence.

        Return False where that is the sequence itself.
        """
        assert sequence.table is not None
        start, end = sequence.pending_slots
        while not sequence.table.grow(start, end):
            if self.prefixes.evict_until(sequence.table.missing_blocks(start, end)):
                continue
            youngest = self.running[-1]
            self._preempt(youngest, step)
            if youngest is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence, step: Step) -> None:
        """Take everything back; the sequence recomputes its keys and values when it is readmitted."""
        self.running.remove(sequence)
        self._vacate(sequence)
        sequence.num_computed = 0
        sequence.phase = Phase.WAITING
        self.waiting.push(sequence, front=True)
        step.counts.preempted += 1

    def _vacate(self, sequence: Sequence) -> None:
        assert sequence.table is not None
        sequence.table.release()
        sequence.table = None
        self.prefixes.unpin(sequence.prefixes)
        sequence.prefixes = sequence.stands_on = ()

    def _prefill(self, sequence: Sequence, step: Step) -> None:
        for prefix in sequence.prefixes:
            if not prefix.is_ready:
                self._build_prefix(prefix, step)
            if not prefix.is_ready:
                return
        if step.budget:
            grown = sequence.table is not None and sequence.table.grow(*sequence.pending_slots)
            assert grown, "blocks for the whole prompt were taken at admission"
            item = prefill_item(sequence, step.budget)
            step.add(sequence, item)
            sequence.num_computed += item.kv.num_tokens
            step.counts.prefill_tokens += item.kv.num_tokens

    def _build_prefix(self, prefix: Prefix, step: Step) -> None:
        """Plan the next part of a prefix: written as it is, or run through the model."""
        self.prefixes.grow(prefix)
        if prefix.needs_write:
            assert prefix.prompt is not None
            step.write(prefix, PrefixWrite(prefix.id, prefix.prompt, prefix.own_slots()))
            self.prefixes.advance(prefix, prefix.segment.num_slots)
        elif step.budget:
            item = prefix_item(prefix, step.budget)
            step.add(prefix, item)
            self.prefixes.advance(prefix, item.kv.num_tokens)
            step.counts.prefix_tokens += item.kv.num_tokens

    # -- admission --------------------------------------------------------------------------

    def _admit(self, step: Step) -> None:
        while step.budget and len(self.running) < self._config.max_rows:
            sequence = self.waiting.peek()
            if sequence is None:
                return
            if self._missing_prompts(sequence):
                if len(self.loading) >= self._config.max_rows:  # prompts take memory too
                    return
                self.waiting.remove(sequence)
                self._park(sequence)
            elif self._place(sequence, step):
                self._prefill(sequence, step)
            else:
                return

    def _missing_prompts(self, sequence: Sequence) -> set[str]:
        """Return the digests of the prompts that it needs the bytes of, and hasn't got."""
        return {
            segment.prompt_digest
            for key, segment in zip(sequence.prefix_keys, sequence.request.segments, strict=True)
            if segment.prompt_digest is not None
            and segment.prompt_digest not in sequence.prompts
            and self.prefixes.get(key) is None
        }

    def _park(self, sequence: Sequence) -> None:
        sequence.awaited = self._missing_prompts(sequence)
        sequence.phase = Phase.LOADING
        self.loading.add(sequence)
        self._to_load.append(sequence)

    def _place(self, sequence: Sequence, step: Step) -> bool:
        """Give a sequence its prefixes and blocks for all its tokens; False when they don't suffice.

        While others run, a block for each of them stays free, so that admission doesn't preempt.
        """
        segments = sequence.request.segments
        found = [prefix for key in sequence.prefix_keys if (prefix := self.prefixes.get(key)) is not None]
        needed = self.blocks.blocks_for(len(sequence.tokens)) + len(self.running) * self.blocks.blocks_for(1)
        for segment in segments[len(found) :]:
            needed += self.blocks.blocks_for(segment.num_slots)
        self.prefixes.pin(found)  # before anything is evicted
        if not self.prefixes.evict_until(needed):
            self.prefixes.unpin(found)
            return False
        if len(found) < len(segments):
            step.counts.prefix_misses += 1
        elif segments:
            step.counts.prefix_hits += 1
        for key, segment in zip(sequence.prefix_keys[len(found) :], segments[len(found) :], strict=True):
            parent = found[-1] if found else None
            found.append(
                self.prefixes.create(key, segment, parent, sequence.prompts.get(segment.prompt_digest or ""))
            )
        self._start(sequence, found)
        return True

    def _start(self, sequence: Sequence, prefixes: list[Prefix]) -> None:
        self.waiting.take(sequence)
        sequence.prompts.clear()  # the prefixes have them now, for as long as they are needed
        sequence.prefixes = tuple(prefixes)
        sequence.stands_on = tuple(prefix.id for prefix in prefixes)
        first_slot, _ = sequence.pending_slots
        sequence.table = SlotTable(self.blocks, prefixes[-1].table if prefixes else None, first_slot)
        grown = sequence.table.grow(*sequence.pending_slots)
        assert grown, "blocks were counted before"
        sequence.phase = Phase.RUNNING
        self.running.append(sequence)
        if sequence.constraint is not None:
            sequence.constraint.begin()
        if sequence.admitted is None:  # recomputing after a preemption is not charged
            self.waiting.charge(sequence, len(sequence.tokens))
            sequence.admitted = time.monotonic()

    # -- update -----------------------------------------------------------------------------

    def update(self, step: Step, result: StepResult, now: float) -> list[tuple[Sequence, Output]]:
        """Apply a step's result; sequences that end free what they hold. A late row has no output."""
        outputs: list[tuple[Sequence, Output]] = []
        for sequence in step.sequences():
            if sequence.phase is not Phase.RUNNING:
                continue
            sequence.scores += result.scores.get(sequence.id, ())
            token = result.tokens.get(sequence.id)
            if token is None:
                continue
            if token.is_late and sequence.id not in step.errors:
                sequence.num_computed -= 1  # taken again with the next step, to the same slot
            else:
                error = step.errors.get(sequence.id, token.error)
                outputs.append((sequence, self._accept(sequence, token, error, now)))
        return outputs

    def _accept(
        self, sequence: Sequence, token: SampledToken, error: PromptplexError | None, now: float
    ) -> Output:
        scores = tuple(sequence.scores) if sequence.num_generated == 0 else ()
        if not token.is_finite or any(math.isnan(score.logprob) for score in scores):
            error = _not_finite()
        if error is not None:
            self.finish(sequence)
            return error
        only_scores = sequence.request.max_new_tokens == 0
        reason = FinishReason.LENGTH if only_scores else sequence.accept(token.token_id, now)
        if not only_scores:
            self.waiting.charge(sequence, 1)
        if reason is not None:
            self.finish(sequence)
        return TokenDelta(
            token_id=None if only_scores else token.token_id,
            logprob=0.0 if only_scores else token.logprob,
            top=token.top,
            scores=scores,
            finish=reason,
            timings=sequence.timings(now) if reason is not None else None,
        )

    def check_integrity(self) -> None:
        """Assert that blocks, slots, pins and phases are conserved; run at idle and between test steps."""
        tables = [prefix.table for prefix in self.prefixes]
        tables += [sequence.table for sequence in self.running if sequence.table is not None]
        self.blocks.check_integrity(tables)
        self.prefixes.check_integrity([sequence.prefixes for sequence in self.running])
        for sequence in self.waiting:
            assert sequence.phase is Phase.WAITING
            assert sequence.table is None
            assert not sequence.prefixes
        assert all(sequence.phase is Phase.RUNNING for sequence in self.running)
        assert all(sequence.phase is Phase.LOADING for sequence in self.loading)


def _not_finite() -> NonFiniteLogits:
    return NonFiniteLogits(
        "the model produced NaN or infinite logits for this request; if it names a task, the task's "
        "prompt is the likely cause: check its values, or roll the task back"
    )
