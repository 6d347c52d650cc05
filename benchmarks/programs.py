"""What chains, votes and questions cost beside separate requests: ``python -m benchmarks.programs``.

Each pair does the same work on one engine: a chain whose steps continue each other and one whose steps don't,
a vote and as many requests with its prompt, questions about one input and a request for each. Reported are
the tokens that go through the model and the seconds, and how many times as much the second of a pair takes.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from app.engine.statistics import StepStats
from app.request import Request, SamplingParams, Segment, segments_of
from benchmarks.completions import submit_all
from benchmarks.machine import machine
from benchmarks.shared_engine import SharedEngine
from benchmarks.spread import Spread
from benchmarks.work import SHAPES, Work, random_model


class Programs:
    """The programs on one engine, each with what it shares or without."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        shape = SHAPES[options.shape]
        work = Work(shape=shape, tasks=1, requests=64, virtual_tokens=0, prompt_tokens=1024)
        self._shared = SharedEngine(random_model(shape), [work])
        self._number = 0
        ids = random.Random(options.seed)

        def text(count: int) -> tuple[int, ...]:
            return tuple(ids.randrange(3, shape.vocabulary) for _ in range(count))

        self._prompt = text(options.prompt_tokens)
        self._questions = [text(options.question_tokens) for _ in range(options.questions)]
        self._labels = [text(1), text(2)]

    def close(self) -> None:
        """End the engine."""
        self._shared.close()

    def chain(self, *, shares: bool) -> None:
        """Steps one after the other; each reads all before it."""
        text, before = self._prompt, None
        for _ in range(self._options.steps):
            request = self._request(text, self._options.step_tokens, is_held=shares, continues=before)
            (said,) = self._run([request])
            text, before = (*text, *said), request.id if shares else None
        if before is not None:
            self._shared.engine.release(before)

    def vote(self, *, shares: bool) -> None:
        """Ballots, all at once."""
        request = self._request(self._prompt, self._options.step_tokens)
        self._run([self._sample(request, index, shares=shares) for index in range(self._options.ballots)])

    def questions(self, *, shares: bool) -> None:
        """All labels of all questions, at once; those of a question share its text in both cases."""
        self._run(
            [
                replace(
                    self._request((question[-1], *label), 0),
                    segments=self._before(question[:-1], shares=shares),
                    num_scored=len(label),
                )
                for question in self._questions
                for label in self._labels
            ]
        )

    def _before(self, question: tuple[int, ...], *, shares: bool) -> tuple[Segment, ...]:
        parts = (self._prompt, question) if shares else (self._prompt + question,)
        return segments_of(*(Segment(token_ids=part, is_kept=False) for part in parts))

    @staticmethod
    def _sample(request: Request, index: int, *, shares: bool) -> Request:
        *before, last = request.token_ids
        sampling = SamplingParams(do_sample=True, seed=1, sample_index=index)
        own = replace(request, id=f"{request.id}-{index}", sampling=sampling)
        shared = segments_of(Segment(token_ids=tuple(before), is_kept=False))
        return replace(own, segments=shared, token_ids=(last,)) if shares else own

    def _request(self, token_ids: tuple[int, ...], max_new_tokens: int, **more: Any) -> Request:
        self._number += 1
        return Request(id=str(self._number), token_ids=token_ids, max_new_tokens=max_new_tokens, **more)

    def _run(self, requests: Sequence[Request]) -> list[tuple[int, ...]]:
        futures = submit_all(self._shared.engine, requests)
        return [future.result(600).token_ids for future in futures]

    def measure(self, program: Callable[[], None]) -> tuple[int, float]:
        """Tokens that a run takes through the model, and its seconds."""
        steps = self._shared.steps
        steps.clear()
        begin = time.perf_counter()
        program()
        seconds = time.perf_counter() - begin
        self._run([self._request((3,), 1)])
        while steps[-1].num_prefill_tokens != 1 or steps[-1].new_tokens != 1:
            time.sleep(0.001)  # until its step is counted, and so all before it are
        return sum(map(_num_computed, steps[:-1])), seconds


def _num_computed(step: StepStats) -> int:
    return step.num_decode_rows + step.num_prefill_tokens + step.num_prefix_tokens


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run all pairs, in rounds that alternate which of a pair is first."""
    programs = Programs(options)
    found: dict[str, Any] = {}
    try:
        for program in (programs.chain, programs.vote, programs.questions):
            runs: dict[bool, list[tuple[int, float]]] = {True: [], False: []}
            for number in range(options.rounds + 1):  # the first one warms up
                for shares in (True, False) if number % 2 else (False, True):
                    runs[shares].append(programs.measure(partial(program, shares=shares)))
            found[program.__name__] = _compared(runs[True], runs[False])
    finally:
        programs.close()
    return {"machine": machine(), "options": vars(options), "programs": found}


def _compared(shared: list[tuple[int, float]], separate: list[tuple[int, float]]) -> dict[str, Any]:
    seconds = [[value for _, value in runs[1:]] for runs in (shared, separate)]
    return {
        "tokens": {"shared": shared[-1][0], "separate": separate[-1][0]},
        "tokens_ratio": round(separate[-1][0] / shared[-1][0], 2),
        "seconds": {"shared": Spread.of(seconds[0]).as_json(), "separate": Spread.of(seconds[1]).as_json()},
        "seconds_ratio": Spread.of([b / a for a, b in zip(*seconds, strict=True)]).as_json(2),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.programs", description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen2-0.4b")
    defaults = {"rounds": 5, "seed": 0, "prompt-tokens": 256, "steps": 6, "step-tokens": 20}
    for name, value in (defaults | {"ballots": 9, "questions": 400, "question-tokens": 12}).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    print(json.dumps(measure(parser.parse_args(arguments)), indent=2))


if __name__ == "__main__":
    main()
