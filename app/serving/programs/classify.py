"""Classification: which of some labels the model finds most probable after the input."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from app.errors import InvalidRequest, NonFiniteLogits
from app.request import FinishReason, ProgramKind, RequestTimings
from app.serving.admitted import Admitted
from app.serving.generation_request import Classification, ClassificationRequest, TextDelta
from app.serving.programs.label_scores import score_labels, temperature_of
from app.serving.publishing.task_settings import LabelledChoice, parse_choices
from app.serving.session import Session


@dataclass(frozen=True, slots=True)
class Classify:
    """Score every label; the answer is the most probable one."""

    kind: ClassVar = ProgramKind.CLASSIFY
    request: ClassificationRequest

    async def run(self, session: Session, admitted: Admitted) -> AsyncGenerator[tuple[int, TextDelta], None]:
        """Yield one delta, which carries the result."""
        choices = self._choices(admitted)
        labels = await self._labels(session, choices)
        session.reserve(len(labels) - self.request.num_known)
        [scored] = await score_labels(session, admitted, [admitted.request], [labels])
        if isinstance(scored, NonFiniteLogits):
            raise scored
        probabilities = scored.probabilities(
            temperature_of(admitted), length_normalized=self.request.length_normalized
        )
        probabilities = probabilities or [1 / len(choices)] * len(choices)
        best = max(range(len(choices)), key=probabilities.__getitem__)
        result = admitted.result(
            text=choices[best].value,
            tokens=session.scored_tokens(admitted, scored.deltas[best].scores),
            finish=FinishReason.EOS,
            timings=RequestTimings.longest(scored.timings),
            classification=Classification(
                probabilities=tuple(
                    (choice.value, p) for choice, p in zip(choices, probabilities, strict=True)
                ),
                label_mass=scored.mass,
            ),
        )
        yield 0, TextDelta(text=result.text, result=result)

    def _choices(self, admitted: Admitted) -> list[LabelledChoice]:
        given = self.request.choices
        if given is None:
            given = () if admitted.version is None else admitted.version.choices
            if not given:
                raise InvalidRequest(
                    "The task has no choices of its own; send them.", param="parameters.choices"
                )
        choices = parse_choices(given)
        if len({choice.value for choice in choices}) < len(choices):
            raise InvalidRequest("Two choices have the same value.", param="parameters.choices")
        if len(choices) < 2:
            raise InvalidRequest("There must be at least two choices.", param="parameters.choices")
        return choices

    async def _labels(self, session: Session, choices: Sequence[LabelledChoice]) -> list[tuple[int, ...]]:
        labels = await session.label_ids([c.text for c in choices], with_eos=self.request.score_eos)
        for choice, ids in zip(choices, labels, strict=True):
            if not ids:
                raise InvalidRequest(
                    f"The choice {choice.value!r} has no tokens.", param="parameters.choices"
                )
        return labels
