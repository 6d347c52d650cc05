"""Programs: what a request does with the model, over a session's `admit`, `generate` and `score`.

A program gets an admitted request and yields the deltas of its answers. The session ends its sequences with
it, holds every part to one version of each task, and counts and charges each part. So programs to come stay
as short as the two that there are:

- a chain generates a step, admits the request again with the step in its inputs (or of the task that the step
  names), and so on; it yields the deltas of its steps, and the last one carries the result;
- a vote generates samples as `Complete` does, reads them to their ends, and yields the winner;
- an ensemble is a vote over `admit` of several versions.
"""

from collections.abc import AsyncGenerator
from typing import Protocol

from app.serving.admitted import Admitted
from app.serving.generation_request import GenerationRequest, TextDelta
from app.serving.programs.classify import Classify
from app.serving.programs.complete import BestOf, Complete
from app.serving.programs.search import Search
from app.serving.session import Session


class Program(Protocol):
    """A way to answer one request."""

    def run(self, session: Session, admitted: Admitted) -> AsyncGenerator[tuple[int, TextDelta], None]:
        """Yield deltas, each with the number of its answer; the last one of an answer carries its result.

        `admitted` is the request's first part. Raise what the session's methods raise.
        """
        ...


def program_for(request: GenerationRequest, admitted: Admitted) -> Program:
    """Return the request's program: the one place that picks it."""
    if request.classification is not None:
        return Classify(request.classification)
    if admitted.parameters.num_beams > 1:
        return Search(request.num_samples)
    if request.best_of is not None and request.best_of > request.num_samples:
        return BestOf(request.best_of, request.num_samples)
    return Complete(request.num_samples)
