"""Recovery: a step failed, and another one that was to follow it is under way already.

Neither counts. Keys and values from before them are still there, for every token writes a slot of its own, so
rows go back to where they were, and what the steps held is scheduled again. Only rows that the steps gave
something to which may be wrong begin anew.
"""

from collections.abc import Iterable, Sequence

from app.engine.residency import Residency
from app.engine.sequence import Phase
from app.engine.sequence import Sequence as Row
from app.engine.step import Step


def go_back(steps: Sequence[Step], running: Iterable[Row], residency: Residency) -> list[Row]:
    """Let rows take again what `steps` took through the model; drop what ended rows left of it.

    Return the rows that have to begin anew.
    """
    _drop_held(steps, residency)
    begins = _begins(steps)
    anew = [row for row in running if _is_spoilt(row, steps) or not _is_covered(row, begins.get(row))]
    for row, slot in begins.items():
        if row not in anew:
            row.go_back(slot)
    return anew


def drop_prefixes(steps: Sequence[Step], residency: Residency) -> None:
    """Drop the prefixes that `steps` built. Nothing stands on them any more."""
    prefixes = [prefix for step in steps for prefix in step.prefixes.values()]
    for prefix in sorted(prefixes, key=lambda prefix: -len(prefix.ancestors)):
        residency.prefixes.drop(prefix)


def _drop_held(steps: Sequence[Step], residency: Residency) -> None:
    for step in steps:
        for row in step.sequences.values():
            if row.phase is Phase.FINISHED:
                residency.held.drop(row.request.id)
        for prefix in step.prefixes.values():
            residency.held.drop_on(prefix.key)


def _begins(steps: Sequence[Step]) -> dict[Row, int]:
    """Return the first slot index that the steps wrote for each row that still waits for their outcome."""
    begins: dict[Row, int] = {}
    for step in steps:
        for item in step.items:
            row = step.sequences.get(item.id)
            if row is not None and item.id not in step.left and row.phase is Phase.RUNNING:
                begins.setdefault(row, item.kv.num_computed)
    return begins


def _is_spoilt(row: Row, steps: Sequence[Step]) -> bool:
    """Return whether a row needs what the steps made beside its own tokens.

    Copies may be any row's, and what a row continues may have got its last tokens in one of the steps.
    """
    return (
        row.beams is not None
        or row.request.continues is not None
        or any(
            step.copies or row.reads in step.sources or not step.prefixes.keys().isdisjoint(row.stands_on)
            for step in steps
        )
    )


def _is_covered(row: Row, slot: int | None) -> bool:
    """Return whether no window gave back what tokens from `slot` on see."""
    return slot is None or (row.table is not None and row.table.covers(slot))
