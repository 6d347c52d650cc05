"""The protocol of programs."""

from collections.abc import AsyncGenerator
from typing import Protocol

from app.request import ProgramKind
from app.serving.admitted import Admitted
from app.serving.generation_request import TextDelta
from app.serving.session import Session


class Program(Protocol):
    """A way to answer one request."""

    @property
    def kind(self) -> ProgramKind:
        """What it counts as."""
        ...

    def run(self, session: Session, admitted: Admitted) -> AsyncGenerator[tuple[int, TextDelta], None]:
        """Yield deltas, each with the number of its answer; the last one of an answer carries its result.

        `admitted` is the request's first part. Raise what the session's methods raise.
        """
        ...
