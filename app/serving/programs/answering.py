"""One answer to an admitted request, in the way of its version: what samples and ballots are made of."""

from collections.abc import AsyncGenerator

from app.serving.admitted import Admitted
from app.serving.generation_request import TextDelta
from app.serving.session import Session


def answer(session: Session, admitted: Admitted) -> AsyncGenerator[TextDelta, None]:
    """Yield the answer's deltas; the last one carries its result. Raise what the session's methods raise."""
    return session.generate(admitted)
