"""One answer to an admitted request, in the way of its version: what samples and ballots are made of."""

from collections.abc import AsyncGenerator

from app.serving.admitted import Admitted
from app.serving.generation_request import TextDelta
from app.serving.programs.reasoning import reasoned
from app.serving.session import Session


def answer(session: Session, admitted: Admitted) -> AsyncGenerator[TextDelta, None]:
    """Yield the answer's deltas; the last one carries its result. Raise what the session's methods raise."""
    reasoning = admitted.program.reasoning
    if reasoning is not None and admitted.request.max_new_tokens:
        return reasoned(session, admitted, reasoning)
    return session.generate(admitted)
