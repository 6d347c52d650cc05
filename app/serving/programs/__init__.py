"""Programs: what a request does with the model, over a session's `admit`, `generate` and `score`.

A program gets an admitted request and yields the deltas of its answers. The session ends its sequences with
it, holds every part to one version of each task, and counts and charges each part.

- One answer comes in the way of its version (`answering.py`): at once, behind a marker after steps that may
  have a budget (`reasoning.py`), or after steps that each read those before them (`chain.py`).
- Samples (`complete.py`), ballots (`vote.py`) and an ensemble's versions (`ensemble.py`) are several such
  answers at once; beam search (`search.py`) finds whole answers.
- Labels are scored, not generated: `classify.py`, and `decide.py` for many questions about one input.
"""

from app.request import ProgramKind
from app.serving.admitted import Admitted
from app.serving.generation_request import GenerationRequest
from app.serving.program_settings import ProgramSettings
from app.serving.programs.classify import Classify
from app.serving.programs.complete import BestOf, Complete
from app.serving.programs.ensemble import Ensemble
from app.serving.programs.program import Program
from app.serving.programs.search import Search
from app.serving.programs.vote import SelfConsistency


def program_for(request: GenerationRequest, admitted: Admitted) -> Program:
    """Return the request's program: the one place that picks it."""
    return Ensemble(request, _of_version) if admitted.members else _of_version(request, admitted)


def _of_version(request: GenerationRequest, admitted: Admitted) -> Program:
    """Return the program of a request that one version answers."""
    if request.classification is not None:
        return Classify(request.classification)
    vote = admitted.asked.vote
    if vote is not None:
        return SelfConsistency(vote.num_ballots, request.num_sequences)
    if admitted.parameters.num_beams > 1:
        return Search(request.num_samples)
    if request.best_of is not None and request.best_of > request.num_samples:
        return BestOf(request.best_of, request.num_samples)
    return Complete(request.num_samples, _kind_of_answer(admitted.program))


def _kind_of_answer(program: ProgramSettings) -> ProgramKind:
    if program.chain is not None:
        return ProgramKind.CHAIN
    return ProgramKind.COMPLETE if program.reasoning is None else ProgramKind.REASONING
