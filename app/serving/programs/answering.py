"""One answer to an admitted request, in the way of its version: what samples and ballots are made of."""

from collections.abc import AsyncGenerator

from app.serving.admitted import Admitted
from app.serving.generation_request import TextDelta
from app.serving.programs.chain import chained
from app.serving.programs.reasoning import reasoned
from app.serving.session import Session


def answer(session: Session, admitted: Admitted) -> AsyncGenerator[TextDelta, None]:
    """Yield the answer's deltas; the last one carries its result. Raise what the session's methods raise."""
    program, is_generated = admitted.program, admitted.request.max_new_tokens > 0
    if program.chain is not None and is_generated:
        return chained(session, admitted, program.chain)
    if program.reasoning is not None and is_generated:
        return reasoned(session, admitted, program.reasoning)
    return session.generate(admitted)
