"""Completion: one answer, or several samples that share the prompt, its keys and values, and a seed."""

import math
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import ClassVar

from app.concurrency import interleave
from app.request import ProgramKind
from app.serving.admitted import Admitted
from app.serving.generation_request import GenerationResult, TextDelta
from app.serving.programs.answering import answer
from app.serving.session import Session


@dataclass(frozen=True, slots=True)
class Complete:
    """Generate `num_samples` answers at once; one that fails ends all."""

    num_samples: int
    kind: ProgramKind = ProgramKind.COMPLETE

    def run(self, session: Session, admitted: Admitted) -> AsyncGenerator[tuple[int, TextDelta], None]:
        """Yield the samples' deltas, each with the number of its sample, which is hashed with the seed."""
        samples = [sample(admitted, index) for index in range(self.num_samples)]
        return interleave([answer(session, each) for each in samples])


@dataclass(frozen=True, slots=True)
class BestOf:
    """Generate `num_samples` answers, and keep the `num_answers` with the highest mean log-probability."""

    kind: ClassVar = ProgramKind.BEST_OF
    num_samples: int
    num_answers: int

    async def run(self, session: Session, admitted: Admitted) -> AsyncGenerator[tuple[int, TextDelta], None]:
        """Yield one delta for each answer that is kept, best first, which carries its result."""
        results: list[GenerationResult] = []
        async with aclosing(Complete(self.num_samples).run(session, admitted)) as deltas:
            async for _, delta in deltas:
                if delta.result is not None:
                    results.append(delta.result)
        results.sort(key=_mean_logprob, reverse=True)
        for number, result in enumerate(results[: self.num_answers]):
            yield number, TextDelta(text=result.text, result=result)


def _mean_logprob(result: GenerationResult) -> float:
    return math.fsum(token.logprob for token in result.tokens) / max(1, len(result.tokens))


def sample(admitted: Admitted, index: int) -> Admitted:
    """Return the request of sample number `index`, which is hashed with the seed."""
    if not index:
        return admitted
    request = admitted.request
    sampling = replace(request.sampling, sample_index=index)
    return replace(admitted, request=replace(request, id=f"{request.id}-sample-{index}", sampling=sampling))
