"""Promptplex's engine: all requests at once, tasks mixed."""

import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from app.engine.statistics import StepStats
from app.request import Request, Segment, segments_of
from benchmarks.completions import submit_all
from benchmarks.first_token import measure_first_token
from benchmarks.shared_engine import SharedEngine
from benchmarks.sides import Answer
from benchmarks.work import Ask, Work

_SECONDS = 600.0  # no run takes as long; a hanging one must end


class Promptplex:
    """The engine on one work."""

    name = "Promptplex"
    uses_prompts = True

    def __init__(self, shared: SharedEngine, work: Work, prompts: Sequence[Tensor]) -> None:
        self._shared = shared
        self.work = work
        self._steps: list[StepStats] = []
        self._digests = [shared.source.add(rows) if work.virtual_tokens else None for rows in prompts]

    def run(self, asks: Sequence[Ask]) -> list[Answer]:
        """Submit all, wait for all."""
        self._shared.steps.clear()
        requests = [self._request(number, ask) for number, ask in enumerate(asks)]
        futures = submit_all(self._shared.engine, requests)
        completions = [future.result(timeout=_SECONDS) for future in futures]
        self._steps = list(self._shared.steps)
        answers = []
        for completion in completions:
            first = completion.timings.queue + completion.timings.prefill
            last = first + completion.timings.decode
            answers.append(Answer(token_ids=completion.token_ids, first_token=first, last_token=last))
        return answers

    def decode_steps(self) -> list[float]:
        """Seconds of the last run's steps in which all requests decoded and nothing else happened."""
        full = (step for step in self._steps if step.num_decode_rows == self.work.requests)
        return [step.duration for step in full if not step.num_prefill_tokens + step.num_prefix_tokens]

    def measure_first_token(self, pairs: int) -> dict[str, Any]:
        """Of lone requests, with and without a resident prompt."""
        return measure_first_token(self._shared, self.work, pairs)

    def close(self) -> None:
        """End the engine, which all works share."""
        self._shared.close()

    def _request(self, number: int, ask: Ask) -> Request:
        digest = self._digests[ask.task]
        return Request(
            id=f"{time.perf_counter_ns()}-{number}",
            token_ids=ask.token_ids,
            segments=segments_of(
                Segment(
                    prompt_digest=digest,
                    num_virtual_tokens=0 if digest is None else self.work.virtual_tokens,
                )
            ),
            max_new_tokens=self.work.new_tokens,
            task=str(ask.task),
        )
