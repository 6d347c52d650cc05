"""Classification: which of some labels the model finds most probable after the input.

Each label's ids follow the prompt's as they are. All labels run at once and share the keys and values
of the prompt: they stand on one prefix that ends before the prompt's last token, and go with it. In an
encoder-decoder they follow the tokens that every answer begins with, and share one source.
"""

import math
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace

from app.errors import InvalidRequest
from app.request import (
    FinishReason,
    Request,
    RequestTimings,
    SamplingParams,
    Segment,
    TokenScore,
    segments_of,
)
from app.serving.admitted import Admitted
from app.serving.generation_request import Classification, ClassificationRequest, TextDelta
from app.serving.publishing.task_settings import LabelledChoice, parse_choices
from app.serving.session import Session


@dataclass(frozen=True, slots=True)
class Classify:
    """Score every label; the answer is the most probable one."""

    request: ClassificationRequest

    async def run(self, session: Session, admitted: Admitted) -> AsyncGenerator[tuple[int, TextDelta], None]:
        """Yield one delta, which carries the result."""
        choices = self._choices(admitted)
        labels = await self._labels(session, choices)
        session.reserve(len(labels) - self.request.num_known)
        requests = [_request(admitted, number, ids) for number, ids in enumerate(labels)]
        scored = await session.score(admitted, requests)
        totals = [self._total(delta.scores) for delta in scored]
        probabilities = _softmax(totals)
        best = max(range(len(choices)), key=probabilities.__getitem__)
        result = admitted.result(
            text=choices[best].value,
            tokens=session.scored_tokens(admitted, scored[best].scores),
            finish=FinishReason.EOS,
            timings=_slowest([delta.timings for delta in scored if delta.timings is not None]),
            classification=Classification(
                probabilities=tuple(
                    (choice.value, p) for choice, p in zip(choices, probabilities, strict=True)
                )
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

    def _total(self, scores: Sequence[TokenScore]) -> float:
        total = math.fsum(score.logprob for score in scores)
        return total / len(scores) if self.request.length_normalized else total


def _request(admitted: Admitted, number: int, label: tuple[int, ...]) -> Request:
    """Return the label after the prompt; the prompt's last token gives the score of the label's first one."""
    request = admitted.request
    *shared, last = request.token_ids
    text = Segment(token_ids=tuple(shared), is_kept=False)
    return replace(
        request,
        id=f"{request.id}-choice-{number}",
        segments=segments_of(*request.segments, text),
        token_ids=(last, *label),
        num_scored=len(label),
        num_top=0,
        max_new_tokens=1,
        sampling=SamplingParams(),
        grammar=None,
        stop_ids=frozenset(),
    )


def _softmax(totals: Sequence[float]) -> list[float]:
    highest = max(totals)
    if math.isinf(highest):  # the model gives none of them a chance
        return [1 / len(totals)] * len(totals)
    weights = [math.exp(total - highest) for total in totals]
    return [weight / math.fsum(weights) for weight in weights]


def _slowest(timings: Sequence[RequestTimings]) -> RequestTimings:
    return RequestTimings(
        queue=max(each.queue for each in timings),
        prefill=max(each.prefill for each in timings),
        decode=max(each.decode for each in timings),
    )
