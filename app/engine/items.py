"""What a sequence, a prefix or a source contributes to a step, as an item of the Plan."""

from app.engine.plan import PlanItem, SourceItem
from app.engine.prefixes import Prefix
from app.engine.sampling.inputs import SamplingInput
from app.engine.sequence import Sequence
from app.engine.sources import Source
from app.models.attention.metadata import PackedItem, PackedSource

MAX_SCORED_ROWS = 256  # logits over the whole vocabulary are large: so many at a time


def decode_item(sequence: Sequence, kv: PackedItem) -> PlanItem:
    """Return the one pending token, or the one under way, which samples."""
    follows = sequence.num_computed == len(sequence.tokens)
    return PlanItem(
        id=sequence.id,
        kv=kv,
        position=sequence.first_position + sequence.num_computed,
        token_ids=() if follows else (sequence.tokens[-1],),
        follows=follows,
        sampling=(_sampling_ahead(sequence) if follows else _sampling_input(sequence),),
        stands_on=sequence.stands_on,
        reads=sequence.reads,
    )


def guessing_item(sequence: Sequence, item: PlanItem, guesses: tuple[int, ...]) -> PlanItem:
    """Return a row's item with guesses after its token; a token is chosen after each."""
    sampling, state = [*item.sampling], sequence.sampling.fork()
    for position, guess in enumerate(guesses, sequence.num_generated + 1):
        state.accept(guess)
        sampling.append(state.input(position))
    return item._replace(
        kv=sequence.kv(item.kv.num_computed, 1 + len(guesses)),
        token_ids=(*item.token_ids, *guesses),
        sampling=tuple(sampling),
    )


def prefill_item(sequence: Sequence, budget: int) -> PlanItem:
    """Return as many pending tokens as the budget allows; the last of them samples, unless all is scored."""
    count = min(sequence.num_pending, budget)
    start = sequence.num_computed
    score_from, score_ids = _scoring(sequence, start)
    if score_ids:
        count = min(count, MAX_SCORED_ROWS)
    is_last, request = count == sequence.num_pending, sequence.request
    before, _ = sequence.pending_slots
    return PlanItem(
        id=sequence.id,
        kv=sequence.kv(before, count),
        position=sequence.first_position + start,
        token_ids=tuple(sequence.tokens[start : start + count]),
        sampling=(_sampling_input(sequence),) if is_last and not request.is_only_scored else (),
        score_from=score_from - start,
        score_ids=score_ids[: max(start + count - score_from, 0)],
        num_top=request.num_top,
        stands_on=sequence.stands_on,
        reads=sequence.reads,
    )


def prefix_item(prefix: Prefix, budget: int) -> PlanItem:
    """Return the next tokens of a prefix: a soft prompt's rows, or ids of text."""
    done, segment = prefix.num_computed, prefix.segment
    count = min(segment.num_slots - done, budget)
    start = prefix.first_slot + done
    source = prefix.source
    cross_slots = () if source is None else source.slots
    return PlanItem(
        id=prefix.id,
        kv=PackedItem(start, count, prefix.table.slots(start + count) + cross_slots),
        position=prefix.first_position + done,
        token_ids=segment.token_ids[done : done + count],
        soft_prompt=prefix.prompt,
        soft_from=done,
        stands_on=prefix.ancestors,
        reads=None if source is None else source.id,
    )


def source_item(source: Source) -> SourceItem:
    """Return the whole input of the encoder."""
    return SourceItem(
        id=source.id,
        kv=PackedSource(source.input.num_slots, source.own_slots, source.prefix_slots),
        token_ids=source.input.token_ids,
        soft_prompt=source.prompt,
    )


def _scoring(sequence: Sequence, start: int) -> tuple[int, tuple[int, ...]]:
    """Return which prompt tokens are still to be scored: the first one's predecessor, and their ids.

    Both as far as they can be had from own token `start` on.
    """
    ids = sequence.request.token_ids
    first = max(len(ids) - sequence.request.num_scored + len(sequence.scores), start + 1)
    return first - 1, ids[first:] if sequence.request.num_scored else ()


def _sampling_input(sequence: Sequence) -> SamplingInput:
    is_constrained = sequence.constraint is not None
    return sequence.sampling.input(sequence.num_generated, is_constrained=is_constrained)


def _sampling_ahead(sequence: Sequence) -> SamplingInput:
    is_constrained = sequence.constraint is not None
    return sequence.sampling.input_ahead(sequence.num_generated + 1, is_constrained=is_constrained)
