"""How the programs of one call end, for statistics."""

import time
from collections.abc import Sequence
from types import TracebackType

from app.request import ProgramKind, ProgramOutcome
from app.serving.admitted import Admitted
from app.serving.generation_request import GenerationResult, TextDelta
from app.serving.outcomes import failure_of
from app.serving.session import Session


class ProgramWatch:
    """Sees the deltas of a call's answers; as a context also the error that ends them."""

    def __init__(
        self, session: Session, kinds: Sequence[ProgramKind], admitted: Sequence[Admitted], answers_each: int
    ) -> None:
        """`kinds` of the programs, which have `answers_each` answers."""
        self.results: dict[int, GenerationResult] = {}  # by the number of the answer
        self._session = session
        self._running = list(zip(kinds, admitted, strict=True))
        self._answers_each = answers_each
        self._ends: dict[int, float] = {}  # time.monotonic() of its last result, by the program's number
        self._failure = "cancelled"  # unless an error says more

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._running:
            self._failure = failure_of(error, self._running[0][1].request.deadline)

    def seen(self, item: tuple[int, TextDelta]) -> tuple[int, TextDelta]:
        """Note the result, if the delta has one; return the item."""
        number, delta = item
        if delta.result is not None:
            self.results[number] = delta.result
            self._ends[number // self._answers_each] = time.monotonic()
        return item

    def report(self) -> None:
        """Count all programs, once; those without all their answers have failed."""
        running, self._running = self._running, []
        for number, (kind, admitted) in enumerate(running):
            self._session.program_ended(self._outcome(number, kind, admitted))

    def _outcome(self, number: int, kind: ProgramKind, admitted: Admitted) -> ProgramOutcome:
        first = number * self._answers_each
        results = [
            self.results[each] for each in range(first, first + self._answers_each) if each in self.results
        ]
        if len(results) < self._answers_each:
            return ProgramOutcome(kind=kind, reason=self._failure, seconds=time.monotonic() - admitted.begin)
        vote = results[0].vote
        return ProgramOutcome(
            kind=kind,
            reason=str(results[0].finish),
            seconds=self._ends[number] - admitted.begin,
            chain_steps=_chain_steps(results) if admitted.program.chain is not None else (),
            num_ballots=0 if vote is None else len(vote.ballots),
        )


def _chain_steps(results: Sequence[GenerationResult]) -> tuple[int, ...]:
    parts = (part for result in results for part in result.parts)
    shown = (part.reasoning for part in parts if part.reasoning is not None and part.reasoning.is_shown)
    return tuple(len(reasoning.steps) for reasoning in shown)
