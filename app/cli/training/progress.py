"""What a run shows while it goes on: a bar on a terminal, lines elsewhere. All of it on stderr."""

import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Self

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from app.training.report.contents import tokens_per_second
from app.training.run import DevRecord, History, Listener, StepRecord

_BLOCKS = "▁▂▃▄▅▆▇█"
_WIDTH = 40  # of the sparkline
_FEWEST = 5  # steps before anything is said about the time left
_WINDOW = 50  # steps over which a rate is taken
_LINE_SECONDS = 10.0  # between two lines about steps, where there is no terminal


class Pace:
    """Losses, tokens per second and time left of a run."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.step = 0
        self.losses: list[float] = []
        self.look: DevRecord | None = None
        self._recent: deque[StepRecord] = deque(maxlen=_WINDOW)
        self._began = time.monotonic()
        self._first = 0

    def start(self, history: History) -> None:
        """Begin after the steps of the history."""
        self.losses = [record.loss for record in history.steps]
        self.step = self._first = len(history.steps)
        self._began = time.monotonic()
        for look in history.looks:
            self.see(look)

    def take(self, record: StepRecord) -> None:
        """Count a step."""
        self.step = record.step
        self.losses.append(record.loss)
        self._recent.append(record)

    def see(self, look: DevRecord) -> None:
        """Keep the best look."""
        if look.is_best:
            self.look = look

    @property
    def seconds_left(self) -> float | None:
        """Return how long it takes at most, at the pace so far with its looks; None: too early to say."""
        done = self.step - self._first
        if done < _FEWEST:
            return None
        return (time.monotonic() - self._began) / done * (self.num_steps - self.step)

    def figures(self) -> str:
        """Return loss, dev scores, tokens per second and time left."""
        parts = [f"loss {self.losses[-1]:.3f}"] if self.losses else []
        if self.look is not None:
            parts.append(f"dev {scores_in_words(self.look)} (step {self.look.step})")
        if self._recent:
            parts.append(f"{tokens_per_second(self._recent):,.0f} tokens/s")
        if (left := self.seconds_left) is not None:
            parts.append(f"at most {clock(left)} left")
        return "  ".join(parts)


def scores_in_words(look: DevRecord) -> str:
    """Return the main score and the loss of a look: `accuracy 93.8%, loss 0.112`."""
    scores = [f"{name} {value:.1%}" for name, value in list(look.scores.items())[:1]]
    return ", ".join([*scores, f"loss {look.loss:.3f}"])


def clock(seconds: float) -> str:
    """Return `1:05`, or `2:00:09`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def sparkline(values: Sequence[float], width: int = _WIDTH) -> str:
    """Return the values as blocks, each the mean of a stretch; the highest is a full one."""
    size = -(-len(values) // width) or 1
    means = [sum(part) / len(part) for part in (values[at : at + size] for at in range(0, len(values), size))]
    low, high = min(means, default=0.0), max(means, default=0.0)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((mean - low) * scale)] for mean in means)


class LineProgress:
    """A line now and then, for logs and pipes."""

    def __init__(self, num_steps: int) -> None:
        self._pace = Pace(num_steps)
        self._said = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def say(self, line: str) -> None:
        """Show a line."""
        typer.echo(line, err=True)

    def on_start(self, history: History) -> None:
        """Say where a resumed run goes on."""
        self._pace.start(history)
        if self._pace.step:
            self.say(f"going on after step {self._pace.step} of {self._pace.num_steps}")

    def on_step(self, record: StepRecord) -> None:
        """Say how it goes, every few seconds."""
        self._pace.take(record)
        if time.monotonic() - self._said > _LINE_SECONDS:
            self._said = time.monotonic()
            self.say(f"step {record.step} of {self._pace.num_steps}  {self._pace.figures()}")

    def on_dev(self, record: DevRecord) -> None:
        """Say what a look found."""
        self._pace.see(record)
        self.say(f"step {record.step}: dev {scores_in_words(record)}{' (best)' if record.is_best else ''}")

    def on_advice(self, line: str) -> None:
        """Show it."""
        self.say(f"advice: {line}")


class BarProgress:
    """A bar with a sparkline of the loss, which moves in its place on a terminal."""

    def __init__(self, num_steps: int) -> None:
        self._console = Console(stderr=True)
        self._pace = Pace(num_steps)
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=self._console)
        self._task = self._bar.add_task("training", total=num_steps)
        self._live = Live(self, console=self._console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def __rich__(self) -> Group:
        """Return what is drawn several times a second."""
        return Group(self._bar, Text(sparkline(self._pace.losses)), Text(self._pace.figures()))

    def say(self, line: str) -> None:
        """Show a line above the bar."""
        self._console.print(Text(line))

    def on_start(self, history: History) -> None:
        """Begin to draw."""
        self._pace.start(history)
        self._bar.update(self._task, completed=self._pace.step)
        self._live.start()

    def on_step(self, record: StepRecord) -> None:
        """Move the bar."""
        self._pace.take(record)
        self._bar.update(self._task, completed=record.step)

    def on_dev(self, record: DevRecord) -> None:
        """Show what a look found."""
        self._pace.see(record)

    def on_advice(self, line: str) -> None:
        """Show it above the bar."""
        self.say(f"advice: {line}")


class NoProgress(LineProgress):
    """Shows nothing but advice."""

    def say(self, line: str) -> None:
        """Show nothing."""

    def on_advice(self, line: str) -> None:
        """Show it."""
        typer.echo(f"advice: {line}", err=True)


AnyProgress = LineProgress | BarProgress


def progress_for(num_steps: int, *, is_quiet: bool) -> AnyProgress:
    """Return what suits stderr."""
    if is_quiet:
        return NoProgress(num_steps)
    return BarProgress(num_steps) if sys.stderr.isatty() else LineProgress(num_steps)


class Listeners:
    """Several listeners as one; all get each record, in their order."""

    def __init__(self, *listeners: Listener) -> None:
        self._listeners = listeners

    def on_start(self, history: History) -> None:
        """Pass it on."""
        for each in self._listeners:
            each.on_start(history)

    def on_step(self, record: StepRecord) -> None:
        """Pass it on."""
        for each in self._listeners:
            each.on_step(record)

    def on_dev(self, record: DevRecord) -> None:
        """Pass it on."""
        for each in self._listeners:
            each.on_dev(record)

    def on_advice(self, line: str) -> None:
        """Pass it on."""
        for each in self._listeners:
            each.on_advice(line)
