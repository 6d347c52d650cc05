"""Prefill: what a sequence stands on and what it reads is made first, then its own tokens run, in chunks."""

from app.engine.items import prefill_item, prefix_item, source_item
from app.engine.plan import PrefixWrite
from app.engine.prefixes import Prefix, PrefixCache
from app.engine.sequence import Sequence
from app.engine.sources import Source
from app.engine.step import Step


def prefill(sequence: Sequence, step: Step, prefixes: PrefixCache) -> None:
    """Plan the next part of a sequence's prefill, as far as the step's budget goes."""
    for prefix in sequence.prefixes:
        if not prefix.is_ready and _encode(prefix.source, step):
            _build_prefix(prefix, step, prefixes)
        if not prefix.is_ready:
            return
    if _encode(sequence.source, step) and step.budget:
        grown = sequence.table is not None and sequence.table.grow(*sequence.pending_slots)
        assert grown, "blocks for the whole prompt were taken at admission"
        item = prefill_item(sequence, step.budget)
        step.add(sequence, item)
        sequence.num_computed += item.kv.num_tokens
        step.counts.prefill_tokens += item.kv.num_tokens


def _encode(source: Source | None, step: Step) -> bool:
    """Plan a source's pass through the encoder; return whether its readers' tokens can follow.

    It can't be cut in chunks: one that exceeds what is left of the budget is the first of its step.
    """
    if source is None or source.is_encoded:
        return True
    if source.input.num_slots >= step.budget and (step.sources or not step.budget):
        return False
    step.encode(source, source_item(source))
    source.is_encoded = True
    return True


def _build_prefix(prefix: Prefix, step: Step, prefixes: PrefixCache) -> None:
    """Plan the next part of a prefix: written as it is, or run through the model."""
    prefixes.grow(prefix)
    if prefix.needs_write:
        assert prefix.prompt is not None
        step.write(prefix, PrefixWrite(prefix.id, prefix.prompt, prefix.own_slots()))
        prefixes.advance(prefix, prefix.segment.num_slots)
    elif step.budget:
        item = prefix_item(prefix, step.budget)
        step.build(prefix, item)
        prefixes.advance(prefix, item.kv.num_tokens)
