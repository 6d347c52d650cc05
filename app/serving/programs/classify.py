"""Classification: which of some labels the model finds most probable after the input.

Each label's ids follow the prompt's as they are. All labels run at once and share the keys and values
of the prompt: they stand on one prefix that ends before the prompt's last token, and go with it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from app.errors import InvalidRequest
from app.request import Request, RequestTimings, SamplingParams, TokenScore
from app.serving.generation import GenerationService
from app.serving.generation_request import GenerationRequest, OutputToken
from app.serving.publishing.task_settings import parse_choices
from app.serving.request_builder import Admitted


@dataclass(frozen=True, slots=True)
class Choice:
    """What the caller calls a label, and the text that is scored for it."""

    value: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassificationRequest:
    """Which labels, and how they are compared. `choices` None: the task's own."""

    choices: tuple[Any, ...] | None
    score_eos: bool = True  # whether an answer that goes on counts as another one
    length_normalized: bool = False  # compare means, not sums, of log-probabilities


@dataclass(frozen=True, slots=True, kw_only=True)
class Classification:
    """The labels' probabilities, which sum to 1, in the order in which they were given."""

    best: Choice
    probabilities: tuple[tuple[str, float], ...]
    tokens: tuple[OutputToken, ...]  # of the best label
    admitted: Admitted
    timings: tuple[RequestTimings, ...]  # of the labels, which ran at once

    @property
    def confidence(self) -> float:
        """The best label's probability."""
        return max(probability for _, probability in self.probabilities)


async def choose(
    service: GenerationService, ask: GenerationRequest, how: ClassificationRequest
) -> Classification:
    """Score every label. Raises what `GenerationService.generate` raises."""
    ahead = len(how.choices or ()) or 1  # the task's own choices are known when it is found
    with service.limiter.hold(ahead):
        admitted = await service.admit(ask)
        choices = _choices(how, admitted)
        labels = await service.on_thread(
            lambda: [_label_ids(service, choice, how.score_eos) for choice in choices],
            sum(len(choice.text) for choice in choices),
        )
        requests = [_request(admitted, number, ids) for number, ids in enumerate(labels)]
        with service.limiter.hold(len(requests) - ahead):
            scored = await service.score(admitted, requests)
    scores = [delta.scores for delta in scored]
    totals = [_total(row, how.length_normalized) for row in scores]
    probabilities = _softmax(totals)
    best = max(range(len(choices)), key=probabilities.__getitem__)
    return Classification(
        best=choices[best],
        probabilities=tuple((choice.value, p) for choice, p in zip(choices, probabilities, strict=True)),
        tokens=service.scored_tokens(admitted.prompt_ids, scores[best]),
        admitted=admitted,
        timings=tuple(delta.timings for delta in scored if delta.timings is not None),
    )


def _choices(how: ClassificationRequest, admitted: Admitted) -> list[Choice]:
    given = how.choices
    if given is None:
        given = () if admitted.version is None else admitted.version.choices
        if not given:
            raise InvalidRequest("The task has no choices of its own; send them.", param="parameters.choices")
    parsed = parse_choices(list(given), "parameters.choices")
    choices = [
        Choice(each, each) if isinstance(each, str) else Choice(each["value"], each["text"])
        for each in parsed
    ]
    if len({choice.value for choice in choices}) < len(choices):
        raise InvalidRequest("Two choices have the same value.", param="parameters.choices")
    if len(choices) < 2:
        raise InvalidRequest("There must be at least two choices.", param="parameters.choices")
    return choices


def _label_ids(service: GenerationService, choice: Choice, score_eos: bool) -> tuple[int, ...]:
    ids = service.request_builder.tokenizer.plain_ids(choice.text)
    if score_eos and service.request_builder.eos_ids:
        ids += (min(service.request_builder.eos_ids),)
    if not ids:
        raise InvalidRequest(f"The choice {choice.value!r} has no tokens.", param="parameters.choices")
    return ids


def _request(admitted: Admitted, number: int, label: tuple[int, ...]) -> Request:
    """The label after the prompt, whose last token tells how probable the label's first one is."""
    prompt = admitted.prompt_ids
    resident = prompt[:-1]
    return replace(
        admitted.request,
        id=f"{admitted.request.id}-choice-{number}",
        resident_ids=resident,
        token_ids=(prompt[-1], *label),
        num_scored=len(label),
        max_new_tokens=1,
        sampling=SamplingParams(),
        grammar=None,
        stop_ids=frozenset(),
        keeps_prefix=resident == admitted.request.resident_ids,
    )


def _total(scores: Sequence[TokenScore], length_normalized: bool) -> float:
    total = math.fsum(score.logprob for score in scores)
    return total / len(scores) if length_normalized else total


def _softmax(totals: Sequence[float]) -> list[float]:
    highest = max(totals)
    if math.isinf(highest):  # the model gives none of them a chance
        return [1 / len(totals)] * len(totals)
    weights = [math.exp(total - highest) for total in totals]
    return [weight / math.fsum(weights) for weight in weights]
