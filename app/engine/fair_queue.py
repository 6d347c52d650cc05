"""Which sequence is served next: fair share between tenants, and within a tenant between tasks.

Virtual token counters after "Fairness in Serving Large Language Models" (VTC, OSDI 2024): each
party has a counter of service received; the party with the least is next. Time on this scale is the
counter of the party that was served last; a party that comes (back) is lifted to it, so that
idling saves up nothing and a newcomer doesn't collect for the time it was away.
"""

from collections import deque
from collections.abc import Iterator

from app.engine.sequence import Sequence

Party = tuple[str, str]  # tenant and task


class FairQueue:
    """Waiting sequences by (tenant, task). First in, first out within a task."""

    def __init__(self) -> None:
        self._tenants = _Counters()
        self._tasks: dict[str, _Counters] = {}
        self._waiting: dict[Party, deque[Sequence]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[Sequence]:
        for waiting in self._waiting.values():
            yield from waiting

    def push(self, sequence: Sequence, *, front: bool = False) -> None:
        """Queue a sequence; `front` for one that was preempted."""
        tenant, task = sequence.party
        if all(tenant != other for other, _ in self._waiting):
            self._tenants.lift(tenant)
        if (tenant, task) not in self._waiting:
            self._tasks.setdefault(tenant, _Counters()).lift(task)
        waiting = self._waiting.setdefault((tenant, task), deque())
        (waiting.appendleft if front else waiting.append)(sequence)

    def peek(self) -> Sequence | None:
        """The next sequence to admit."""
        if not self._waiting:
            return None
        tenant = self._tenants.least({tenant for tenant, _ in self._waiting})
        task = self._tasks[tenant].least({task for owner, task in self._waiting if owner == tenant})
        return self._waiting[tenant, task][0]

    def take(self, sequence: Sequence) -> None:
        """Take a sequence out to be served: time moves on to its parties' counters."""
        tenant, task = sequence.party
        self._tenants.advance(tenant)
        self._tasks[tenant].advance(task)
        self.remove(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it stands, unserved."""
        party = sequence.party
        self._waiting[party].remove(sequence)
        if not self._waiting[party]:
            del self._waiting[party]

    def charge(self, party: Party, num_tokens: int) -> None:
        """Count service: own prompt and new source at first admission, output tokens as they come."""
        tenant, task = party
        self._tenants.charge(tenant, num_tokens)
        self._tasks.setdefault(tenant, _Counters()).charge(task, num_tokens)

    def reset(self) -> None:
        """Start anew when nothing waits or runs, so that counters don't pile up."""
        assert not self._waiting
        self._tenants = _Counters()
        self._tasks.clear()


class _Counters:
    """Virtual token counters of one level."""

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        self._now = 0.0

    def lift(self, party: str) -> None:
        self._served[party] = max(self._served.get(party, 0.0), self._now)

    def advance(self, party: str) -> None:
        self._now = max(self._now, self._served[party])

    def least(self, parties: set[str]) -> str:
        return min(parties, key=lambda party: (self._served[party], party))

    def charge(self, party: str, num_tokens: int) -> None:
        self._served[party] = self._served.get(party, self._now) + num_tokens
