"""What a run shows while it goes on: figures that are right, and lines that a log can hold."""

import io
import math

import pytest
from rich.console import Console

from app.cli.training.progress import (
    BarProgress,
    LineProgress,
    Listeners,
    NoProgress,
    Pace,
    clock,
    progress_for,
    sparkline,
)
from app.training.run import DevRecord, History, StepRecord


def step(number: int, loss: float = 1.0) -> StepRecord:
    return StepRecord(step=number, loss=loss, learning_rate=0.01, grad_norm=1.0, num_tokens=300, seconds=0.1)


def look(number: int, exact: float, *, is_best: bool = True) -> DevRecord:
    return DevRecord(step=number, loss=0.5, scores={"exact": exact}, is_best=is_best, seconds=1.0)


def test_a_sparkline_shows_the_highest_as_a_full_block() -> None:
    assert sparkline([]) == ""
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([0.0, 3.5, 7.0]) == "▁▅█"
    assert len(sparkline([float(number) for number in range(1000)], width=40)) == 40
    assert sparkline([math.exp(-number) for number in range(80)], width=40)[0] == "█"


def test_a_clock_has_hours_only_where_there_are_any() -> None:
    assert [clock(seconds) for seconds in (0, 65, 3600, 7209)] == ["0:00", "1:05", "1:00:00", "2:00:09"]


def test_figures_are_those_of_the_last_steps_and_the_best_look() -> None:
    pace = Pace(100)
    pace.start(History(steps=(step(1), step(2)), looks=(look(0, 0.25),)))
    assert pace.figures() == "loss 1.000  dev exact 25.0%, loss 0.500 (step 0)"
    for number in range(3, 8):
        pace.take(step(number, loss=2.0))
    pace.see(look(7, 0.75))
    pace.see(look(8, 0.5, is_best=False))
    assert pace.figures().startswith(
        "loss 2.000  dev exact 75.0%, loss 0.500 (step 7)  3,000 tokens/s  at most"
    )


def test_without_a_terminal_there_are_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    progress = progress_for(10, is_quiet=False)
    assert isinstance(progress, LineProgress)
    with progress:
        progress.on_start(History(steps=(step(1),)))
        progress.on_step(step(2))
        progress.on_dev(look(2, 0.5))
        progress.on_dev(look(4, 0.25, is_best=False))
        progress.on_advice("try more")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "going on after step 1 of 10",
        "step 2: dev exact 50.0%, loss 0.500 (best)",
        "step 4: dev exact 25.0%, loss 0.500",
        "advice: try more",
    ]


def test_a_quiet_run_shows_advice_alone(capsys: pytest.CaptureFixture[str]) -> None:
    progress = progress_for(10, is_quiet=True)
    assert isinstance(progress, NoProgress)
    progress.on_start(History())
    progress.on_dev(look(2, 0.5))
    progress.on_advice("try more")
    assert capsys.readouterr().err == "advice: try more\n"


def test_a_bar_draws_figures_and_takes_text_as_it_is() -> None:
    progress, written = BarProgress(10), io.StringIO()
    progress.on_step(step(1))
    progress.on_dev(look(1, 0.5))
    Console(file=written, width=100).print(progress)
    assert "1/10" in written.getvalue()
    assert "dev exact 50.0%" in written.getvalue()
    progress.say("[bold]not markup[/nothing]")  # raises where it was parsed


def test_listeners_get_each_record_in_order() -> None:
    shown: list[str] = []

    class Recorder(LineProgress):
        def say(self, line: str) -> None:
            shown.append(line)

    both = Listeners(Recorder(2), Recorder(2))
    both.on_start(History())
    both.on_step(step(1))
    both.on_dev(look(1, 1.0))
    both.on_advice("x")
    assert shown == ["step 1: dev exact 100.0%, loss 0.500 (best)"] * 2 + ["advice: x"] * 2
