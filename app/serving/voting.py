"""Whether answers are voted on: where a request asks for that, or its task does and nothing is against it.

A request's own vote is refused beside what it can't be had with. A task's vote is a default: like beams of a
default, it gives way to what the request says itself, and the answer then has no vote.
"""

from collections.abc import Iterator
from dataclasses import replace

from app.errors import InvalidRequest
from app.serving.generation_request import GenerationRequest, VoteRequest
from app.serving.program_settings import ProgramSettings


def settle_vote(request: GenerationRequest, program: ProgramSettings) -> GenerationRequest:
    """Return the request with the vote that counts: its own, else its task's; None where one answer does.

    Raise InvalidRequest where the request's own vote can't be had.
    """
    own, default = request.vote, program.vote
    if own is None and (default is None or request.steps):
        return request
    vote = VoteRequest(num_ballots=default.n) if own is None and default is not None else own
    if vote is None or vote.num_ballots == 1:
        return replace(request, vote=None)
    obstacle = next(_obstacles(request), None)
    if obstacle is None:
        return replace(request, vote=vote)
    if own is None:
        return request
    raise InvalidRequest(f"vote: {obstacle}, or leave vote out.", param="parameters.vote")


def _obstacles(request: GenerationRequest) -> Iterator[str]:
    """Yield why answers to this request aren't voted on, and what to leave out."""
    if request.classification is not None:
        yield "choices are scored, not generated, so that there is nothing to vote on; leave choices out"
    if request.parameters.get("max_new_tokens") == 0:
        yield "nothing is generated to vote on; send max_new_tokens"
    if request.best_of is not None:
        yield "best_of is another way to choose among samples; leave best_of out"
    if request.num_samples > 1:
        yield "a vote has one answer, and its ballots are its samples; leave n out"
    if request.parameters.get("num_beams", 1) > 1:
        yield "ballots are samples, which beam search doesn't draw; leave num_beams out"
    if request.parameters.get("do_sample") is False:
        yield "without sampling all ballots are the same; leave out do_sample: false, or temperature 0"
