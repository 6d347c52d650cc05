"""Who is served next: fair share between tenants, and within a tenant between tasks.

Virtual token counters after "Fairness in Serving Large Language Models" (VTC, OSDI 2024): each
party has a counter of service received; the party with the least is next. A party that becomes
active after a pause is lifted to the least active counter, so that idling saves up nothing.
"""

from collections import deque
from collections.abc import Iterator

from app.engine.sequence import Sequence


class FairQueue:
    """Waiting sequences by (tenant, task). First in, first out within a task."""

    def __init__(self) -> None:
        self._tenants = _Counters()
        self._tasks: dict[str, _Counters] = {}
        self._waiting: dict[tuple[str, str], deque[Sequence]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[Sequence]:
        for waiting in self._waiting.values():
            yield from waiting

    def push(self, sequence: Sequence, *, front: bool = False) -> None:
        """Queue a sequence; `front` for one that was preempted."""
        tenant, task = self._party(sequence)
        tasks = self._tasks.setdefault(tenant, _Counters())
        self._tenants.activate(tenant, (other for other, _ in self._waiting))
        tasks.activate(task, (other for owner, other in self._waiting if owner == tenant))
        waiting = self._waiting.setdefault((tenant, task), deque())
        (waiting.appendleft if front else waiting.append)(sequence)

    def peek(self) -> Sequence | None:
        """The next sequence to admit."""
        if not self._waiting:
            return None
        tenant = self._tenants.least({tenant for tenant, _ in self._waiting})
        task = self._tasks[tenant].least({task for owner, task in self._waiting if owner == tenant})
        return self._waiting[tenant, task][0]

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it stands."""
        party = self._party(sequence)
        self._waiting[party].remove(sequence)
        if not self._waiting[party]:
            del self._waiting[party]

    def charge(self, sequence: Sequence, num_tokens: int) -> None:
        """Count service: own prompt tokens at first admission, output tokens as they come."""
        tenant, task = self._party(sequence)
        self._tenants.charge(tenant, num_tokens)
        self._tasks.setdefault(tenant, _Counters()).charge(task, num_tokens)

    def forget_idle(self, active: set[tuple[str, str]]) -> None:
        """Drop counters of parties that neither wait nor run, so that they can't pile up."""
        active = active | self._waiting.keys()
        tenants = {tenant for tenant, _ in active}
        self._tenants.keep(tenants)
        for tenant in list(self._tasks):
            if tenant in tenants:
                self._tasks[tenant].keep({task for owner, task in active if owner == tenant})
            else:
                del self._tasks[tenant]

    @staticmethod
    def _party(sequence: Sequence) -> tuple[str, str]:
        return sequence.request.tenant, sequence.request.task


class _Counters:
    """Virtual token counters of one level."""

    def __init__(self) -> None:
        self._served: dict[str, float] = {}

    def activate(self, party: str, active: Iterator[str]) -> None:
        others = set(active)
        if party in others:
            return
        floor = min((self._served.get(other, 0.0) for other in others), default=0.0)
        self._served[party] = max(self._served.get(party, 0.0), floor)

    def least(self, parties: set[str]) -> str:
        return min(parties, key=lambda party: (self._served.get(party, 0.0), party))

    def charge(self, party: str, num_tokens: int) -> None:
        self._served[party] = self._served.get(party, 0.0) + num_tokens

    def keep(self, parties: set[str]) -> None:
        self._served = {party: served for party, served in self._served.items() if party in parties}
