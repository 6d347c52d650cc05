"""Sides take turns, so that whatever else the machine does hits all of them."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.processes import RemoteSide, SideProcess
from benchmarks.sides import Answer
from benchmarks.spread import Spread
from benchmarks.work import make_asks


@dataclass(slots=True)
class Record:
    """What one entrant did: a figure a round."""

    num_tokens: int = 0
    num_requests: int = 0
    seconds: list[float] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)  # medians over the requests
    time_per_token: list[float] = field(default_factory=list)
    extra_memory: int | None = None  # bytes above the idle process, at the peak of the warm-up
    answers: list[Answer] = field(default_factory=list)  # of the warm-up

    @property
    def rates(self) -> list[float]:
        """Tokens per second, round by round."""
        return [self.num_tokens / seconds for seconds in self.seconds]


def ratio(ours: Record, other: Record) -> Spread:
    """How many times as fast we are: rates divided within each round."""
    return Spread.of([mine / theirs for mine, theirs in zip(ours.rates, other.rates, strict=True)])


def warm_up(sides: Sequence[RemoteSide], say: Callable[[str], None]) -> dict[str, Record]:
    """One run each, which also tells memory and answers; nothing of it counts as time."""
    records = {}
    for side in sides:
        say(f"warming up: {side.label}")
        run = side.run(make_asks(side.work), watch_memory=True)
        num_tokens = sum(len(answer.token_ids) for answer in run.answers)
        records[side.label] = Record(
            num_tokens, len(run.answers), extra_memory=run.extra_memory, answers=run.answers
        )
    return records


def run_rounds(
    processes: Sequence[SideProcess], records: dict[str, Record], rounds: int, say: Callable[[str], None]
) -> None:
    """All sides once a round; each round starts with another process, and every other one goes backwards.

    So nobody always follows the same one, or always comes first after another process had the cores;
    and the sides of one process stay neighbours, whose ratios are the finest.
    """
    for number in range(rounds):
        shift = number % len(processes)
        order = [side for process in (*processes[shift:], *processes[:shift]) for side in process.sides]
        for side in order if number % 2 == 0 else reversed(order):
            record = records[side.label]
            run = side.run(make_asks(side.work))
            record.seconds.append(run.seconds)
            _note_latencies(record, run.answers)
            say(f"round {number + 1} of {rounds}: {side.label}: {record.rates[-1]:.1f} tokens/s")


def _note_latencies(record: Record, answers: Sequence[Answer]) -> None:
    first = [answer.first_token for answer in answers if answer.first_token is not None]
    later = [answer.time_per_token for answer in answers if answer.time_per_token is not None]
    if first:
        record.first_token.append(statistics.median(first))
    if later:
        record.time_per_token.append(statistics.median(later))
