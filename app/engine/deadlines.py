"""When requests must have ended: the next one is found without looking at the others."""

import heapq
import itertools
import threading

from app.engine.sequence import Phase, Sequence

_SLACK = 64  # ended entries that may stay before the heap is cleaned


class Deadlines:
    """A heap of sequences by deadline; those that ended meanwhile are skipped."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Sequence]] = []
        self._numbers = itertools.count()  # sequences themselves don't compare

    def add(self, sequence: Sequence) -> None:
        if sequence.request.deadline is not None:
            heapq.heappush(self._heap, (sequence.request.deadline, next(self._numbers), sequence))

    def expired(self, now: float) -> list[Sequence]:
        """Take out the sequences whose deadline has passed, in order."""
        late = []
        while self._heap and self._heap[0][0] <= now:
            late.append(heapq.heappop(self._heap)[2])
        return [sequence for sequence in late if sequence.phase is not Phase.FINISHED]

    def seconds_left(self, now: float) -> float | None:
        """Until the next deadline; None: there is none."""
        if not self._heap:
            return None
        return min(max(0.0, self._heap[0][0] - now), threading.TIMEOUT_MAX)

    def clean(self, num_open: int) -> None:
        """Drop ended sequences when they outnumber the `num_open` others by far."""
        if len(self._heap) > 2 * num_open + _SLACK:
            self._heap = [entry for entry in self._heap if entry[2].phase is not Phase.FINISHED]
            heapq.heapify(self._heap)
