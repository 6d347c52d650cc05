"""Promptplex's engine: all requests at once, tasks mixed."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from app.engine.statistics import StepStats
from app.prompt import TaskType
from app.request import Request, SamplingParams, Segment, segments_of
from benchmarks.completions import Completion, submit_all
from benchmarks.first_token import measure_first_token
from benchmarks.shared_engine import SharedEngine
from benchmarks.sides import Answer
from benchmarks.work import Ask, Work

_SECONDS = 600.0  # no run takes as long; a hanging one must end


class Promptplex:
    """The engine on one work."""

    name = "Promptplex"
    uses_prompts = True
    _TASK_TYPE = TaskType.CAUSAL_LM

    def __init__(self, shared: SharedEngine, work: Work, prompts: Sequence[Tensor]) -> None:
        self._shared = shared
        self.work = work
        self._steps: list[StepStats] = []
        self._digests = [
            shared.source.add(rows, self._TASK_TYPE) if work.virtual_tokens else None for rows in prompts
        ]

    def run(self, asks: Sequence[Ask]) -> list[Answer]:
        """Submit all, wait for all."""
        self._shared.steps.clear()
        requests = [request for number, ask in enumerate(asks) for request in self._requests(number, ask)]
        futures = submit_all(self._shared.engine, requests)
        completions = [future.result(timeout=_SECONDS) for future in futures]
        self._steps = list(self._shared.steps)
        if not self.work.num_labels:
            return [_answer(completion) for completion in completions]
        groups = zip(*[iter(completions)] * self.work.num_labels, strict=True)
        return [self._choice(group) for group in groups]

    def _choice(self, scored: Sequence[Completion]) -> Answer:
        """The most probable label."""
        best = max(range(len(scored)), key=lambda number: scored[number].scores[0].logprob)
        return replace(_answer(scored[best]), token_ids=(self.work.labels[best],))

    def decode_steps(self) -> list[float]:
        """Seconds of the last run's steps in which all requests decoded and nothing else happened."""
        full = (step for step in self._steps if step.num_decode_rows == self.work.rows)
        return [step.duration for step in full if not step.num_prefill_tokens + step.num_prefix_tokens]

    def measure_first_token(self, pairs: int) -> dict[str, Any]:
        """Of lone requests, with and without a resident prompt."""
        return measure_first_token(self._shared, self.work, pairs)

    def close(self) -> None:
        """End the engine, which all works share."""
        self._shared.close()

    def _requests(self, number: int, ask: Ask) -> list[Request]:
        """One, or one for each label, which share the text but for its last token."""
        digest = self._digests[ask.task]
        num_virtual_tokens = 0 if digest is None else self.work.virtual_tokens
        prompt = Segment(prompt_digest=digest, num_virtual_tokens=num_virtual_tokens)
        request = Request(
            id=f"{time.perf_counter_ns()}-{number}",
            token_ids=ask.token_ids,
            segments=segments_of(prompt),
            sampling=self._sampling(number),
            max_new_tokens=self.work.new_tokens,
            task=str(ask.task),
        )
        return _label_requests(request, self.work.labels) if self.work.num_labels else [request]

    def _sampling(self, number: int) -> SamplingParams:
        more: dict[str, Any] = dict(self.work.sampling)
        return SamplingParams(do_sample=True, seed=number, **more) if more else SamplingParams()


def _label_requests(request: Request, labels: Sequence[int]) -> list[Request]:
    """As `app.serving.programs.label_scores` makes them."""
    *before, last = request.token_ids
    segments = (*request.segments, *segments_of(Segment(token_ids=tuple(before), is_kept=False)))
    return [
        replace(
            request,
            id=f"{request.id}-{label}",
            segments=segments,
            token_ids=(last, label),
            num_scored=1,
            max_new_tokens=0,
        )
        for label in labels
    ]


def _answer(completion: Completion) -> Answer:
    first = completion.timings.queue + completion.timings.prefill
    last = first + completion.timings.decode
    return Answer(token_ids=completion.token_ids, first_token=first, last_token=last)
