"""Completion: one answer, or several samples that share the prompt, its keys and values, and a seed."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace

from app.concurrency import interleave
from app.serving.admitted import Admitted
from app.serving.generation_request import TextDelta
from app.serving.session import Session


@dataclass(frozen=True, slots=True)
class Complete:
    """Generate `num_samples` answers at once; one that fails ends all."""

    num_samples: int

    def run(self, session: Session, admitted: Admitted) -> AsyncGenerator[tuple[int, TextDelta], None]:
        """Yield the samples' deltas, each with the number of its sample, which is hashed with the seed."""
        samples = [_sample(admitted, index) for index in range(self.num_samples)]
        return interleave([session.generate(sample) for sample in samples])


def _sample(admitted: Admitted, index: int) -> Admitted:
    if not index:
        return admitted
    request = admitted.request
    sampling = replace(request.sampling, sample_index=index)
    return replace(admitted, request=replace(request, id=f"{request.id}-sample-{index}", sampling=sampling))
