"""Sides that take turns in one process on one GPU: ratios are computed within rounds of a second or so."""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.gpu.setup import Clock
from benchmarks.ours import Promptplex
from benchmarks.sides import Answer, Side
from benchmarks.spread import Spread
from benchmarks.work import make_asks


@dataclass(slots=True)
class Turns:
    """What a side did: a figure a round."""

    num_tokens: int  # of one run
    answers: Sequence[Answer]  # of the warm-up
    seconds: list[float] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)  # medians over the requests
    steps: list[float] = field(default_factory=list)  # median seconds of full decode steps

    @property
    def rates(self) -> list[float]:
        """Tokens per second, round by round."""
        return [self.num_tokens / seconds for seconds in self.seconds]

    def as_json(self) -> dict[str, Any]:
        """Medians with quartiles."""
        spreads = {"first_token_seconds": self.first_token, "decode_step_seconds": self.steps}
        return {
            "rounds": len(self.seconds),
            "tokens_per_second": Spread.of(self.rates).as_json(1),
            **{name: Spread.of(values).as_json(6) for name, values in spreads.items() if values},
        }


def take_turns(sides: Mapping[str, Side], rounds: int, clock: Clock) -> dict[str, Turns]:
    """Warm all sides up, then run each once a round, in an order that changes; fewer rounds as time ends."""
    found: dict[str, Turns] = {}
    slowest = 0.0
    for name, side in sides.items():
        began = time.perf_counter()
        answers = side.run(make_asks(side.work))
        slowest += time.perf_counter() - began
        found[name] = Turns(sum(len(answer.token_ids) for answer in answers), answers)
    for number in range(rounds):
        if number and clock.left < slowest:
            break
        names = list(sides)[number % len(sides) :] + list(sides)[: number % len(sides)]
        for name in names if number % 2 == 0 else reversed(names):
            _take_turn(sides[name], found[name])
    return found


def ratio(one: Turns, other: Turns) -> Spread:
    """Return how many times as fast one side is: rates divided within each round."""
    return Spread.of([a / b for a, b in zip(one.rates, other.rates, strict=True)])


def agreement(one: Turns, other: Turns) -> float:
    """Return the share of answers that are the same, token by token: bf16 on random weights has near-ties."""
    pairs = list(zip(one.answers, other.answers, strict=True))
    return sum(a.token_ids == b.token_ids for a, b in pairs) / len(pairs)


def _take_turn(side: Side, turns: Turns) -> None:
    asks = make_asks(side.work)
    began = time.perf_counter()
    answers = side.run(asks)
    turns.seconds.append(time.perf_counter() - began)
    firsts = [answer.first_token for answer in answers if answer.first_token is not None]
    if firsts:
        turns.first_token.append(statistics.median(firsts))
    if isinstance(side, Promptplex) and (steps := side.decode_steps()):
        turns.steps.append(statistics.median(steps))
