"""Plain requests keep their fair share beside a tenant, or a task, that runs votes of 64 and chains."""

from collections import Counter
from dataclasses import replace

import pytest

from app.engine.prefixes import Prefix, prefix_keys
from app.engine.scheduler import Scheduler, SchedulerConfig
from app.engine.sequence import Phase, Sequence
from app.request import Request, Segment
from tests.engine.test_kv_memory import FULL, blocks_of
from tests.engine.test_scheduler import GEOMETRY, advance

MAX_ROWS, NUM_STEPS = 16, 1500
PROMPT, NEW = 40, 12


class Crowd:
    """Two parties that always have more to do than there is room for."""

    def __init__(self, programs: dict[str, str], plain: dict[str, str]) -> None:
        blocks = blocks_of(FULL, kv_cache_bytes=1 << 30)
        self.scheduler = Scheduler(blocks, SchedulerConfig(max_rows=MAX_ROWS, token_budget=64))
        self.programs, self.plain = programs, plain
        self.computed: Counter[str] = Counter()
        self.votes: list[Sequence] = []
        self.chain: Sequence | None = None
        self.others: list[Sequence] = []
        self.number = 0
        self.num_steps = 0

    def submit(self, request: Request) -> Sequence:
        self.number += 1
        request = self.scheduler.residency.aligned(replace(request, id=str(self.number)))
        sequence = Sequence(request, prefix_keys(request, GEOMETRY))
        self.scheduler.add(sequence)
        return sequence

    def fill(self) -> None:
        self.votes = [each for each in self.votes if each.phase is not Phase.FINISHED]
        if len(self.votes) < 64:
            shared = Segment(token_ids=(self.number % 90,) * (PROMPT - 1), is_kept=False)
            ballot = Request(id="", token_ids=(1,), segments=(shared,), max_new_tokens=NEW, **self.programs)  # type: ignore[arg-type]
            self.votes += [self.submit(ballot) for _ in range(64)]
        if self.chain is None or self.chain.phase is Phase.FINISHED:
            before = None if self.chain is None or self.num_steps % 6 == 0 else self.chain
            text = (2,) * PROMPT if before is None else tuple(before.tokens)
            step = Request(id="", token_ids=text, max_new_tokens=NEW, is_held=True, **self.programs)  # type: ignore[arg-type]
            self.chain = self.submit(replace(step, continues=None if before is None else before.request.id))
            self.num_steps += 1
        self.others = [each for each in self.others if each.phase is not Phase.FINISHED]
        while len(self.others) < 2 * MAX_ROWS:
            request = Request(id="", token_ids=(3,) * PROMPT, max_new_tokens=NEW, **self.plain)  # type: ignore[arg-type]
            self.others.append(self.submit(request))

    def step(self) -> None:
        self.fill()
        step = advance(self.scheduler)
        for item in step.items:
            owner = step.owners[item.id]
            party = self.programs if isinstance(owner, Prefix) else _party(owner, self.plain, self.programs)
            self.computed["programs" if party is self.programs else "plain"] += item.kv.num_tokens


def _party(owner: Sequence, *parties: dict[str, str]) -> dict[str, str]:
    request = owner.request
    return next(party for party in parties if party == {name: getattr(request, name) for name in party})


@pytest.mark.parametrize("by", ["tenant", "task"])
def test_votes_and_chains_take_no_more_than_their_share(by: str) -> None:
    """Of tokens that were computed: what a vote shares and a chain reuses is charged once, to its party."""
    crowd = Crowd({by: "programs"}, {by: "plain"})
    for _ in range(NUM_STEPS):
        crowd.step()
    crowd.scheduler.check_integrity()
    plain, programs = crowd.computed["plain"], crowd.computed["programs"]
    bound = 2 * MAX_ROWS * (PROMPT + NEW)  # twice what all rows may be in the middle of
    assert plain + programs > 10 * bound
    assert abs(plain - programs) <= bound
    assert crowd.num_steps > 6, "chains went on meanwhile"
