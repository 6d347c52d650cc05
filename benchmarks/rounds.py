"""Sides take turns, so that whatever else the machine does hits all of them."""

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import psutil

from benchmarks.sides import Answer, Side
from benchmarks.work import Ask, Work

_SAMPLE_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Entrant:
    """A side at one work."""

    side: Side
    work: Work
    asks: Sequence[Ask]

    @property
    def label(self) -> str:
        """What tells it from the others of a run."""
        work = self.work.label if self.side.uses_prompts else f"{self.work.requests} requests"
        return f"{self.side.name} ({work})"


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


@dataclass(frozen=True, slots=True)
class Spread:
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of one value at least."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def as_json(self, digits: int = 3) -> dict[str, float]:
        """Rounded."""
        return {
            "median": round(self.median, digits),
            "quartiles": [round(self.low, digits), round(self.high, digits)],  # type: ignore[dict-item]
        }


def ratio(ours: Record, other: Record) -> Spread:
    """How many times as fast we are: rates divided within each round."""
    return Spread.of([mine / theirs for mine, theirs in zip(ours.rates, other.rates, strict=True)])


def warm_up(entrants: Sequence[Entrant], say: Callable[[str], None]) -> dict[str, Record]:
    """One run each, which also tells memory and answers; nothing of it counts as time."""
    records = {}
    for entrant in entrants:
        say(f"warming up: {entrant.label}")
        chosen = entrant.side.select(entrant.asks)
        with MemoryWatch() as memory:
            answers = entrant.side.run(chosen)
        num_tokens = sum(len(answer.token_ids) for answer in answers)
        records[entrant.label] = Record(num_tokens, len(chosen), extra_memory=memory.extra, answers=answers)
    return records


def run_rounds(
    entrants: Sequence[Entrant], records: dict[str, Record], rounds: int, say: Callable[[str], None]
) -> None:
    """All entrants once a round; each round starts with another one."""
    for number in range(rounds):
        shift = number % len(entrants)
        for entrant in [*entrants[shift:], *entrants[:shift]]:
            record = records[entrant.label]
            chosen = entrant.side.select(entrant.asks)
            began = time.perf_counter()
            answers = entrant.side.run(chosen)
            record.seconds.append(time.perf_counter() - began)
            _note_latencies(record, answers)
            say(f"round {number + 1} of {rounds}: {entrant.label}: {record.rates[-1]:.1f} tokens/s")


def _note_latencies(record: Record, answers: Sequence[Answer]) -> None:
    first = [answer.first_token for answer in answers if answer.first_token is not None]
    later = [answer.time_per_token for answer in answers if answer.time_per_token is not None]
    if first:
        record.first_token.append(statistics.median(first))
    if later:
        record.time_per_token.append(statistics.median(later))


class MemoryWatch:
    """The most resident memory of this process within a block, above what it had before, in bytes."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._before = self._peak = 0

    def __enter__(self) -> "MemoryWatch":
        self._before = self._peak = self._process.memory_info().rss
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            self._peak = max(self._peak, self._process.memory_info().rss)

    @property
    def extra(self) -> int:
        """Bytes."""
        return self._peak - self._before
