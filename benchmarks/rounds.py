"""Sides take turns within seconds, so that whatever else the machine does hits all of them.

A round runs every side of one work once. The speed of a machine may change twofold within minutes, so ratios
are computed within a round; and what the hardware can do is measured between rounds of the same work.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from benchmarks.limits import Hardware, measure_hardware
from benchmarks.other_load import OtherLoad
from benchmarks.processes import RemoteSide, Run
from benchmarks.sides import Answer
from benchmarks.spread import Spread
from benchmarks.work import make_asks

_MAX_OTHER_LOAD = 0.1


@dataclass(slots=True)
class Record:
    """What one side did with one work: a figure a round."""

    num_tokens: int = 0
    num_requests: int = 0
    seconds: list[float] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)  # medians over the requests
    time_per_token: list[float] = field(default_factory=list)
    decode_steps: list[float] = field(default_factory=list)  # median seconds, of ours
    extra_memory: int | None = None  # bytes above the idle process, at the peak of the warm-up
    answers: list[Answer] = field(default_factory=list)  # of the warm-up

    @property
    def rates(self) -> list[float]:
        """Tokens per second, round by round."""
        return [self.num_tokens / seconds for seconds in self.seconds]


@dataclass(slots=True)
class Measured:
    """A work, done in rounds."""

    sides: Sequence[RemoteSide]  # ours first, then ours on other works, then the peers
    records: dict[RemoteSide, Record]
    hardware: list[Hardware] = field(default_factory=list)
    waiting: list[float] = field(default_factory=list)  # CPUs that all waiting sides took, a figure a run
    other_load: list[float] = field(default_factory=list)  # share of the machine, a figure a round
    repeated: int = 0  # rounds that were disturbed
    failed: dict[str, str] = field(default_factory=dict)  # side -> why it takes no part

    @property
    def ours(self) -> Record:
        """Of the work itself."""
        return self.records[self.sides[0]]


class Turn(NamedTuple):
    """One side's run in a round."""

    side: RemoteSide
    run: Run
    waiting_cpus: float
    decode_steps: Sequence[float]


def ratio(ours: Record, other: Record) -> Spread:
    """How many times as fast we are: rates divided within each round."""
    return Spread.of([mine / theirs for mine, theirs in zip(ours.rates, other.rates, strict=True)])


def warm_up(sides: Sequence[RemoteSide], say: Callable[[str], None]) -> Measured:
    """One run each, which also tells memory and answers; nothing of it counts as time."""
    records: dict[RemoteSide, Record] = {}
    failed = {}
    for side in sides:
        try:
            run = side.run(make_asks(side.work), watch_memory=True)
        except RuntimeError as error:
            failed[side.name] = str(error).strip().splitlines()[-1]
            say(f"left out: {side.name}: {failed[side.name]}")
            continue
        lengths = {len(answer.token_ids) for answer in run.answers}
        if lengths != {side.work.new_tokens}:
            raise RuntimeError(f"{side.name}: answers of {sorted(lengths)} tokens to {side.work.name}")
        count, num_tokens = len(run.answers), len(run.answers) * side.work.new_tokens
        records[side] = Record(num_tokens, count, extra_memory=run.extra_memory, answers=run.answers)
    return Measured(list(records), records, failed=failed)


def run_rounds(measured: Measured, rounds: int, say: Callable[[str], None]) -> None:
    """All sides once a round; each round starts with another side, and every other one goes backwards.

    So no side always follows the same one. A round in which other processes had much of the machine is
    repeated, unless that happens too often.
    """
    for number in range(rounds):
        if number in {0, rounds // 2, rounds - 1}:
            measured.hardware.append(measure_hardware())
        turns, load = run_round(measured.sides, number)
        while load > _MAX_OTHER_LOAD and measured.repeated < rounds:
            say(f"{measured.sides[0].work.name}: others had {load:.0%} of the machine; once more")
            measured.repeated += 1
            turns, load = run_round(measured.sides, number)
        measured.other_load.append(load)
        for turn in turns:
            _note(measured, turn)
        rates = [f"{measured.records[side].rates[-1]:.1f}" for side in measured.sides]
        say(f"{measured.sides[0].work.name}, round {number + 1} of {rounds}: {' '.join(rates)}")


def run_round(sides: Sequence[RemoteSide], number: int) -> tuple[list[Turn], float]:
    """Every side once; also the share of the machine that processes had which take no part."""
    shift = number % len(sides)
    order = [*sides[shift:], *sides[:shift]]
    with OtherLoad() as others:
        turns = [_run_side(sides, side) for side in (order if number % 2 == 0 else reversed(order))]
    return turns, others.share


def _run_side(sides: Sequence[RemoteSide], side: RemoteSide) -> Turn:
    waiting = {each.process for each in sides} - {side.process}
    before, began = sum(process.cpu_seconds() for process in waiting), time.perf_counter()
    run = side.run(make_asks(side.work))
    elapsed = time.perf_counter() - began
    waiting_cpus = (sum(process.cpu_seconds() for process in waiting) - before) / elapsed
    steps = side.ask("decode_steps") if side.process is sides[0].process else []
    return Turn(side, run, waiting_cpus, steps)


def _note(measured: Measured, turn: Turn) -> None:
    record = measured.records[turn.side]
    record.seconds.append(turn.run.seconds)
    measured.waiting.append(turn.waiting_cpus)
    _note_latencies(record, turn.run.answers)
    if turn.decode_steps:
        record.decode_steps.append(statistics.median(turn.decode_steps))


def _note_latencies(record: Record, answers: Sequence[Answer]) -> None:
    first = [answer.first_token for answer in answers if answer.first_token is not None]
    later = [answer.time_per_token for answer in answers if answer.time_per_token is not None]
    if first:
        record.first_token.append(statistics.median(first))
    if later:
        record.time_per_token.append(statistics.median(later))
