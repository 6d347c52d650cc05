"""What guessed tokens gain and cost: ``python -m benchmarks.lookup``.

Two engines on the same random weights, each in a process of its own, of which one guesses. They take turns
work by work, and a work's figure is the ratio of neighbouring runs: how much faster tokens come after the
first one. Texts are of three kinds: one that repeats itself, one in which nothing occurs twice, and one of
eight words in random order, in which guesses are made all the time and are mostly wrong.
"""

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from app.request import SamplingParams
from benchmarks.ours import Promptplex
from benchmarks.processes import RemoteSide, SideProcess
from benchmarks.shared_engine import SharedEngine
from benchmarks.sides import Side
from benchmarks.spread import Spread
from benchmarks.work import SHAPES, Work, make_asks, random_model, random_prompts

_WORDS = tuple((id_, 90.0) for id_ in range(100, 108))
_LOOP = ((100, 90.0),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Text(Work):
    """Streams of one kind of text."""

    kind: str


class Streams(Promptplex):
    """One engine's streams of a text."""

    def counts(self) -> tuple[int, int, int]:
        """Return steps, guesses and accepted tokens of the last run."""
        guessed = sum(step.num_speculated_tokens for step in self._steps)
        return len(self._steps), guessed, sum(step.num_accepted_tokens for step in self._steps)

    def _sampling(self, number: int) -> SamplingParams:
        """Return what makes the answer a text of its kind."""
        kind = self.work.kind if isinstance(self.work, Text) else ""
        if kind == "repeats":
            return SamplingParams(logit_bias=_LOOP)
        return SamplingParams(do_sample=True, seed=number, logit_bias=_WORDS if kind == "eight words" else ())


def build(works: Sequence[Text], speculate: int) -> list[Side]:
    """One engine for all works, in the process of its sides."""
    model = random_model(works[0].shape)
    shared = SharedEngine(model, works, speculate=speculate)
    return [Streams(shared, work, random_prompts(model, work)) for work in works]


def seconds_per_token(side: RemoteSide) -> float:
    """Return the median over the rows of one run."""
    times = [answer.time_per_token for answer in side.run(make_asks(side.work)).answers]
    return statistics.median(each for each in times if each is not None)


def works_of(options: argparse.Namespace) -> list[Text]:
    """Every kind of text with every number of rows."""
    return [
        Text(
            shape=SHAPES[options.shape],
            tasks=1,
            requests=rows,
            prompt_tokens=16,
            new_tokens=options.new_tokens,
            kind=kind,
            name=f"{kind}, {rows} row{'s' if rows > 1 else ''}",
        )
        for rows, kind in itertools.product(options.rows, ("repeats", "nothing twice", "eight words"))
    ]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run all rounds; return each work's figures."""
    works = works_of(options)
    plain, guessing = (SideProcess(build, works, count) for count in (0, options.speculate))
    found = {}
    try:
        ratios: dict[str, list[float]] = {work.name: [] for work in works}
        counts = {}
        for number in range(options.rounds + 1):  # the first one warms up
            for pair in zip(plain.sides, guessing.sides, strict=True):
                order = pair if number % 2 else pair[::-1]
                seconds = {side: seconds_per_token(side) for side in order}
                if number:
                    ratios[pair[0].work.name].append(seconds[pair[0]] / seconds[pair[1]])
                counts[pair[0].work.name] = pair[1].ask("counts")
        for label, each in ratios.items():
            steps, guessed, accepted = counts[label]
            speed = Spread.of(each).as_json()
            found[label] = {"speed": speed, "steps": steps, "guessed": guessed, "accepted": accepted}
    finally:
        plain.close()
        guessing.close()
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lookup", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2-0.4b")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--speculate", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=9)
    json.dump(measure(parser.parse_args()), sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
