"""The rows of beam search: a sequence for each beam, on the same prefixes and source, with forked tables."""

from collections.abc import Sequence as Collection

from app.engine.beams import Extension
from app.engine.residency import Residency
from app.engine.router import Output
from app.engine.sequence import BeamGroup, Phase, Sequence
from app.request import TokenDelta


def advance(group: BeamGroup, running: list[Sequence], residency: Residency, now: float) -> Output:
    """Take the candidates of all rows; return how the request ended, or an empty delta: its beams go on."""
    results = [group.results.pop(row.id) for row in group.rows]
    extensions = group.search.advance(results)
    leader = group.leader
    leader.first_token = leader.first_token or now
    if extensions:
        _extend(group, extensions, running, residency)
        for row, extension in zip(group.rows, extensions, strict=True):
            row.accept(extension.token_id, now)
        return TokenDelta()
    found = group.search.hypotheses()
    if not found:
        error = results[0].error
        assert error is not None, "a row without candidates says why"
        return error
    return TokenDelta(
        hypotheses=found,
        scores=tuple(leader.scores),
        finish=found[0].finish,
        timings=leader.timings(now),
    )


def _extend(
    group: BeamGroup, extensions: Collection[Extension], running: list[Sequence], residency: Residency
) -> None:
    """Give each new beam a row: its parent's where that is free, else one whose beam ended, or a new one.

    The leader always gets one. Forks take no blocks: a row gets its own when it grows.
    """
    heirs: dict[int, int] = {}  # by parent, the first beam that continues it
    for number, extension in enumerate(extensions):
        heirs.setdefault(extension.parent, number)
    free = [row for number, row in enumerate(group.rows) if number not in heirs]
    free.sort(key=lambda row: row is not group.leader)
    rows = []
    for number, extension in enumerate(extensions):
        row = parent = group.rows[extension.parent]
        is_heir = heirs[extension.parent] == number
        is_last_chance = group.leader in free and number == len(extensions) - 1
        if not is_heir or is_last_chance:
            row = free.pop(0) if free else _new_row(group, running)
            _follow(row, parent, residency)
        if row is not parent and is_heir:
            free.append(parent)
        rows.append(row)
    for row in free:
        running.remove(row)
        residency.vacate(row)
        row.phase = Phase.FINISHED
    group.rows = rows


def _new_row(group: BeamGroup, running: list[Sequence]) -> Sequence:
    leader = group.leader
    row = Sequence(leader.request, leader.prefix_keys, group, arrived=leader.arrived, scores=leader.scores)
    row.phase = Phase.RUNNING
    running.insert(running.index(leader) + 1, row)
    return row


def _follow(row: Sequence, parent: Sequence, residency: Residency) -> None:
    """Let a row go on from where another one of its group is."""
    residency.fork(parent, row)
    row.tokens, row.num_generated = parent.tokens.copy(), parent.num_generated
    row.sampling = parent.sampling.fork()
    row.num_computed = parent.num_computed
