"""Beam search: the best answers that the engine finds, each with its score."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import ClassVar

from app.request import ProgramKind
from app.serving.admitted import Admitted
from app.serving.generation_request import TextDelta
from app.serving.session import Session


@dataclass(frozen=True, slots=True)
class Search:
    """Search with the beams that the request's parameters say; the best `num_answers` answer it."""

    kind: ClassVar = ProgramKind.SEARCH
    num_answers: int

    async def run(self, session: Session, admitted: Admitted) -> AsyncGenerator[tuple[int, TextDelta], None]:
        """Yield one delta for each answer, best first, which carries its result."""
        for number, result in enumerate(await session.search(admitted, self.num_answers)):
            yield number, TextDelta(text=result.text, result=result)
