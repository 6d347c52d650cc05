"""Ensembles: several versions of a task answer, and their weighted majority is the answer.

As in prompt tuning (Lester et al. 2021, section 6) all run in one batch, since they share the base. For
choices, the weighted mean of the versions' probabilities decides.
"""

import math
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import ClassVar

from app.concurrency import gather_or_cancel
from app.errors import InvalidRequest
from app.prompt import TaskVersion
from app.request import ProgramKind, RequestTimings
from app.serving.admitted import Admitted
from app.serving.generation_request import (
    Ballot,
    Classification,
    GenerationRequest,
    GenerationResult,
    TextDelta,
    Vote,
)
from app.serving.programs.program import Program
from app.serving.programs.vote import poll, winner_of
from app.serving.publishing.task_settings import parse_choices
from app.serving.session import Session


@dataclass(frozen=True, slots=True)
class Ensemble:
    """Let each version answer in its own way: it may itself reason, be a chain, or vote."""

    kind: ClassVar = ProgramKind.ENSEMBLE
    request: GenerationRequest
    program_of: Callable[[GenerationRequest, Admitted], Program]  # of a single version

    async def run(self, session: Session, admitted: Admitted) -> AsyncGenerator[tuple[int, TextDelta], None]:
        """Yield a delta for each version's answer as it comes in, then one that carries the result.

        Raise InvalidRequest for what an ensemble can't do.
        """
        requests = self._requests(admitted)
        session.reserve((len(requests) - 1) * self.request.num_sequences)
        admitting = [session.admit(*each) for each in zip(requests, admitted.versions, strict=True)]
        members = await gather_or_cancel(admitting)
        programs = [self.program_of(*each) for each in zip(requests, members, strict=True)]
        runs = [_only_answer(each.run(session, one)) for each, one in zip(programs, members, strict=True)]
        count = winner_of if self.request.classification is None else _most_probable
        async with aclosing(poll(runs, [weight for _, weight in admitted.members], count)) as deltas:
            async for delta in deltas:
                yield 0, delta

    def _requests(self, admitted: Admitted) -> list[GenerationRequest]:
        """Return what each version is asked; all draw from one seed, where none has its own."""
        self._check(admitted.versions)
        fallbacks = {**self.request.fallbacks, "seed": admitted.request.sampling.seed}
        return [
            replace(self.request, task=_reference(each), fallbacks=fallbacks) for each in admitted.versions
        ]

    def _check(self, versions: Sequence[TaskVersion]) -> None:
        request = self.request
        instead = f"name a version, such as {_reference(versions[0])}"
        if request.num_samples > 1 or request.best_of is not None:
            raise InvalidRequest(
                "n, best_of: an ensemble has one answer, the majority of its versions; leave them out, or "
                f"{instead}.",
                param="n",
            )
        if request.parameters.get("max_new_tokens") == 0:
            raise InvalidRequest(
                "max_new_tokens: each version of an ensemble has a prompt of its own; to score one, "
                f"{instead}.",
                param="parameters.max_new_tokens",
            )
        if request.classification is not None and request.classification.choices is None:
            _check_choices(versions)


def _reference(version: TaskVersion) -> str:
    return f"{version.task_id}@{version.version}"


def _check_choices(versions: Sequence[TaskVersion]) -> None:
    """Raise InvalidRequest where probabilities of these versions' own choices have no mean."""
    first, *others = ({choice.value for choice in parse_choices(each.choices)} for each in versions)
    for version, values in zip(versions[1:], others, strict=True):
        if values != first:
            raise InvalidRequest(
                f"Versions {versions[0].version} and {version.version} of this ensemble have different "
                "choices, so that their probabilities have no mean; send choices, or name one version.",
                param="parameters.choices",
            )


async def _only_answer(
    run: AsyncGenerator[tuple[int, TextDelta], None],
) -> AsyncGenerator[TextDelta, None]:
    async with aclosing(run) as deltas:
        async for _, delta in deltas:
            yield delta


def _most_probable(ballots: Sequence[Ballot]) -> GenerationResult:
    """Return the choice with the highest mean probability; its share is of those that chose it themselves."""
    total = sum(ballot.weight for ballot in ballots)
    labelled = [(_classification(ballot), ballot.weight / total) for ballot in ballots]
    labels = [(dict(each.probabilities), share) for each, share in labelled]
    means = {value: math.fsum(share * each[value] for each, share in labels) for value in labels[0][0]}
    best = max(means, key=means.__getitem__)
    backers = [ballot for ballot in ballots if ballot.result.text == best]
    result = backers[0].result if backers else replace(ballots[0].result, text=best, tokens=())
    return replace(
        result,
        classification=Classification(
            probabilities=tuple(means.items()),
            label_mass=math.fsum(share * each.label_mass for each, share in labelled),
        ),
        vote=Vote(share=sum(each.weight for each in backers) / total, ballots=tuple(ballots)),
        timings=RequestTimings.longest(ballot.result.timings for ballot in ballots),
    )


def _classification(ballot: Ballot) -> Classification:
    assert ballot.result.classification is not None
    return ballot.result.classification
