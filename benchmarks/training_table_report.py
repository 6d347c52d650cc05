"""The table of `benchmarks.training_table` as documents have it: figures, Markdown and a plot.

    python -m benchmarks.training_table_report build/training-table.jsonl

Writes `benchmarks/results/training-table.json` and `docs/images/training-table.svg`, and prints tables.
"""

import argparse
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.plots import save
from benchmarks.training_table import NUM_DEV, NUM_TEST, NUM_TRAIN, TASKS, Run, default_rate, read_run

RESULTS = Path("benchmarks/results/training-table.json")
PLOT = Path("docs/images/training-table.svg")
_COLOURS = ("#3b6fd4", "#d4763b", "#3bab6f", "#9a5bc7", "#77808a")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One setting, over all seeds that are there."""

    task: str
    kind: str  # method and start, as a row of a table
    length: int
    learning_rate: float
    is_default: bool  # whether that rate is the method's own
    accuracies: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    def as_json(self) -> dict[str, Any]:
        """What the results keep."""
        return {
            "task": self.task,
            "prompt": self.kind,
            "num_virtual_tokens": self.length,
            "learning_rate": self.learning_rate,
            "accuracies": [round(each, 4) for each in self.accuracies],
        }

    def __str__(self) -> str:
        low, high = min(self.accuracies), max(self.accuracies)
        return f"{self.mean:.0%}" + (f" ({low * 100:.0f} to {high * 100:.0f})" if low < high else "")


def kind_of(run: Run) -> str:
    """Name a method and what it starts from."""
    return f"{run.method}, {'MLP' if run.network == 'mlp' else run.init}"


def cells_of(lines: Iterable[dict[str, Any]]) -> list[Cell]:
    """Gather the seeds of each setting."""
    by_setting: dict[Run, dict[int, float]] = {}
    for line in lines:
        run = read_run(line)
        by_setting.setdefault(replace(run, seed=0), {})[run.seed] = line["accuracy"]
    return [
        Cell(
            task=run.task,
            kind=kind_of(run),
            length=run.length,
            learning_rate=run.learning_rate,
            is_default=run.learning_rate == default_rate(run.method, run.network, run.init),
            accuracies=tuple(by_seed[seed] for seed in sorted(by_seed)),
        )
        for run, by_seed in by_setting.items()
    ]


def length_table(cells: Sequence[Cell], task: str) -> list[str]:
    """Rows of kinds, columns of lengths: mean accuracy, then the lowest and highest of the seeds."""
    shown = [cell for cell in cells if cell.task == task and cell.is_default]
    lengths = sorted({cell.length for cell in shown})
    by_kind: dict[str, dict[int, str]] = {}
    for cell in shown:
        by_kind.setdefault(cell.kind, {})[cell.length] = str(cell)
    head = [f"| prompt | {' | '.join(map(str, lengths))} |", "|---" * (len(lengths) + 1) + "|"]
    rows = [[kind, *(row.get(length, "") for length in lengths)] for kind, row in sorted(by_kind.items())]
    return [*head, *(f"| {' | '.join(row)} |" for row in rows)]


def rate_table(cells: Sequence[Cell], task: str, length: int) -> list[str]:
    """What was also trained at other learning rates than the method's own."""
    at_length = [cell for cell in cells if (cell.task, cell.length) == (task, length)]
    rated = {cell.kind for cell in at_length if not cell.is_default}
    rows = sorted((cell.kind, cell.learning_rate, cell) for cell in at_length if cell.kind in rated)
    return [
        "| prompt | learning rate | accuracy |",
        "|---|---|---|",
        *(
            f"| {kind} | {rate:g}{' (default)' if cell.is_default else ''} | {cell} |"
            for kind, rate, cell in rows
        ),
    ]


def plot(cells: Sequence[Cell], task: str, target: Path) -> None:
    """Draw accuracy over length, soft prompts beside prefixes; bars span the seeds."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, is_prefix, title in zip(panels, (False, True), ("soft prompts", "prefixes"), strict=True):
        shown = [cell for cell in cells if cell.task == task and cell.is_default]
        kinds = sorted({cell.kind for cell in shown if cell.kind.startswith("prefix") is is_prefix})
        for kind, colour in zip(kinds, _COLOURS, strict=False):
            _line(axes, [cell for cell in shown if cell.kind == kind], colour)
        axes.set_xscale("log")
        axes.set_xticks((1, 5, 16, 50), ("1", "5", "16", "50"))
        axes.minorticks_off()
        axes.set_xlabel("virtual tokens")
        axes.set_title(title, fontsize=10)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(f"share of right answers ({NUM_TEST} held-out inputs)")
    save(figure, target)


def _line(axes: Any, cells: Sequence[Cell], colour: str) -> None:
    line = sorted(cells, key=lambda cell: cell.length)
    below = [cell.mean - min(cell.accuracies) for cell in line]
    above = [max(cell.accuracies) - cell.mean for cell in line]
    at, means = [cell.length for cell in line], [cell.mean for cell in line]
    axes.errorbar(at, means, yerr=[below, above], marker="o", capsize=3, color=colour, label=line[0].kind)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("results", type=Path, help="the file of benchmarks.training_table")
    lines = [json.loads(line) for line in parser.parse_args().results.read_text().splitlines()]
    cells = cells_of(lines)
    kept = {
        "examples": {"train": NUM_TRAIN, "dev": NUM_DEV, "test": NUM_TEST},
        "steps": {name: task.steps for name, task in TASKS.items()},
        "cells": [cell.as_json() for cell in cells],
    }
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    for task in dict.fromkeys(cell.task for cell in cells):
        print("\n".join([f"\n{task}", *length_table(cells, task)]))
    print("\n".join(["", *rate_table(cells, "new", 16)]))
    plot(cells, "new", PLOT)


if __name__ == "__main__":
    main()
