"""One step of the engine: a Plan in the making, and what the engine keeps beside it."""

from collections.abc import Collection
from dataclasses import dataclass, field

from app.engine.plan import LateInput, Plan, PlanItem, PrefixWrite, SlotCopies, SourceItem
from app.engine.prefixes import Prefix
from app.engine.sampling.token_masks import collect_masks
from app.engine.sequence import Sequence
from app.engine.sources import Source
from app.errors import PromptplexError


@dataclass(slots=True)
class StepCounts:
    """What was decided, for statistics."""

    decode_rows: int = 0
    prefill_tokens: int = 0
    prefix_tokens: int = 0
    sources: int = 0
    encoder_tokens: int = 0
    beam_rows: int = 0
    copied_blocks: int = 0
    reused_tokens: int = 0
    preempted: int = 0
    speculated: int = 0  # guesses
    accepted: int = 0  # tokens that came since guesses were right
    prefix_hits: int = 0
    prefix_misses: int = 0
    # Of tokens that came, in seconds.
    first_token_latencies: list[float] = field(default_factory=list)
    inter_token_latencies: list[float] = field(default_factory=list)
    searched_tokens: int = 0  # of the best answers that beam searches ended with


@dataclass(slots=True, eq=False)
class Step:
    """Filled by the scheduler; its Plan goes to the executor."""

    budget: int  # tokens that it may still take
    copies: tuple[SlotCopies, ...] = ()
    writes: list[PrefixWrite] = field(default_factory=list)
    items: list[PlanItem] = field(default_factory=list)
    source_items: list[SourceItem] = field(default_factory=list)
    sources: dict[int, Source] = field(default_factory=dict)  # that it encodes, by id
    # What the Plan's ids stand for.
    sequences: dict[int, Sequence] = field(default_factory=dict)
    prefixes: dict[int, Prefix] = field(default_factory=dict)
    guesses: dict[int, tuple[int, ...]] = field(default_factory=dict)  # after a row's token, by its id
    counts: StepCounts = field(default_factory=StepCounts)
    errors: dict[int, PromptplexError] = field(default_factory=dict)  # of rows that can't go on
    left: set[int] = field(default_factory=set)  # ids for which what it chooses is dropped

    def add(self, sequence: Sequence, item: PlanItem) -> None:
        """Add a sequence's tokens, which the budget loses."""
        self.sequences[item.id] = sequence
        self.items.append(item)
        self.budget -= item.kv.num_tokens

    def guess(self, place: int, item: PlanItem, guesses: tuple[int, ...]) -> None:
        """Replace an item by one with guesses, which the budget loses."""
        self.items[place] = item
        self.guesses[item.id] = guesses
        self.budget -= len(guesses)
        self.counts.speculated += len(guesses)

    def build(self, prefix: Prefix, item: PlanItem) -> None:
        """Add tokens that make a prefix, which the budget loses."""
        self.prefixes[item.id] = prefix
        self.items.append(item)
        self.budget -= item.kv.num_tokens
        self.counts.prefix_tokens += item.kv.num_tokens

    def encode(self, source: Source, item: SourceItem) -> None:
        """Add a source. However long it is, a token of a sequence that reads it goes along."""
        self.sources[item.id] = source
        self.source_items.append(item)
        self.budget = max(1, self.budget - item.kv.num_tokens)
        self.counts.sources += 1
        self.counts.encoder_tokens += item.kv.num_tokens

    def write(self, prefix: Prefix, write: PrefixWrite) -> None:
        """Add a write, which costs no tokens."""
        self.prefixes[write.id] = prefix
        self.writes.append(write)

    @property
    def owners(self) -> dict[int, Sequence | Prefix]:
        """All that takes part, by id."""
        return {**self.prefixes, **self.sequences}

    def plan(self) -> Plan:
        """Return the Plan. Rows of like length stand together, since they share a bucket."""
        rows_first = sorted(self.items, key=lambda item: (item.kv.num_tokens > 1, item.kv.num_computed))
        return Plan(
            writes=tuple(self.writes),
            items=tuple(rows_first),
            sources=tuple(self.source_items),
            copies=self.copies,
        )

    def note_failures(self, plan: Plan, failed: Collection[int]) -> None:
        """Take a source for encoded only where an item that reads it ran; `failed` are ids that didn't."""
        ran = [item for item in plan.items if not {item.id, *item.stands_on} & set(failed)]
        read = {item.reads for item in ran}
        for source in self.sources.values():
            source.is_encoded = source.id in read

    def late_inputs(self, plan: Plan) -> dict[int, LateInput]:
        """Return what (a part of) its Plan needs beside what it says, when all steps before are applied.

        Wait for masks of constrained rows, not for long; the errors of those that can't go on are noted.
        """
        items = [item for item in plan.items if item.has_late_input and item.id not in self.left]
        rows = [(self.sequences[item.id], item.sampling[0].has_late_edits) for item in items]
        masks, errors = collect_masks(
            {row.id: row.constraint for row, _ in rows if row.constraint is not None}
        )
        self.errors.update(errors)
        return {
            row.id: LateInput(masks.get(row.id), row.sampling.edits() if has_late_edits else None)
            for row, has_late_edits in rows
        }
