"""Votes: several answers to one request, of which the most frequent one wins.

Self-consistency (Wang et al. 2022) draws them as samples. Ballots are read to their ends; each is reported
as it comes in.
"""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import ClassVar

from app.concurrency import interleave
from app.request import FinishReason, ProgramKind, RequestTimings
from app.serving.admitted import Admitted
from app.serving.generation_request import Ballot, GenerationResult, TextDelta, Vote
from app.serving.programs.answering import answer
from app.serving.programs.complete import sample
from app.serving.session import Session


@dataclass(frozen=True, slots=True)
class SelfConsistency:
    """Draw `num_ballots` samples at once; ballot k is sample k of a request with this seed."""

    kind: ClassVar = ProgramKind.VOTE
    num_ballots: int
    num_held: int = 1  # sequences that the session holds room for already

    async def run(self, session: Session, admitted: Admitted) -> AsyncGenerator[tuple[int, TextDelta], None]:
        """Yield a delta for each ballot as it comes in, then the winner's, which carries the result."""
        session.reserve(self.num_ballots - self.num_held)
        samples = (sample(admitted, index) for index in range(self.num_ballots))
        runs = [answer(session, each) for each in samples]
        async with aclosing(poll(runs, [1] * self.num_ballots, winner_of)) as deltas:
            async for delta in deltas:
                yield 0, delta


async def poll(
    runs: Sequence[AsyncGenerator[TextDelta, None]],
    weights: Sequence[int],
    count: Callable[[Sequence[Ballot]], GenerationResult],
) -> AsyncGenerator[TextDelta, None]:
    """Read all answers to their ends, each a ballot of its weight; then yield what `count` makes of them."""
    voters = [_cast(*each) for each in zip(range(len(runs)), runs, weights, strict=True)]
    ballots: dict[int, Ballot] = {}
    async with aclosing(interleave(voters, waits_for_all=False)) as cast:
        async for index, ballot in cast:
            ballots[index] = ballot
            yield TextDelta(text="", ballot=ballot)
    result = count([ballots[index] for index in range(len(runs))])
    if result.reasoning is not None and result.reasoning.text:
        yield TextDelta(text=result.reasoning.text, is_reasoning=True)
    yield TextDelta(text=result.text, prompt_scores=result.prompt_scores, result=result)


async def _cast(
    index: int, run: AsyncGenerator[TextDelta, None], weight: int
) -> AsyncGenerator[Ballot, None]:
    async with aclosing(run) as deltas:
        async for delta in deltas:
            if delta.result is not None:
                yield Ballot(result=delta.result, index=index, weight=weight)


def winner_of(ballots: Sequence[Ballot]) -> GenerationResult:
    """Return the answer with most weight, of equal ones the earliest; empty answers have none.

    All is as in the winner's first ballot but times, which are the longest. Where all abstain the answer is
    empty.
    """
    weights: dict[str, int] = {}
    for ballot in ballots:
        weights[ballot.answer] = weights.get(ballot.answer, 0) + ballot.weight
    total = sum(weights.values())
    weights[""] = 0
    answer = max(weights, key=weights.__getitem__)
    first = next((ballot.result for ballot in ballots if ballot.answer == answer), ballots[0].result)
    if not answer:
        first = replace(first, text="", finish=FinishReason.NO_ANSWER)
    vote = Vote(share=weights[answer] / total, ballots=tuple(ballots))
    timings = RequestTimings.longest(ballot.result.timings for ballot in ballots)
    return replace(first, vote=vote, timings=timings)
