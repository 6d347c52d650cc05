"""Plots of a report: tokens per second and shares of t* over rows and virtual tokens, and what parts gain."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.gpu.throughput import MAIN, Cell
from benchmarks.plots import save

_PART = "throughput "
_CELL = re.compile(r"B (\d+), T (\d+), p (\d+)")


def plot(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write a plot for each shape that was measured; return the files."""
    written = []
    for name, part in report["parts"].items():
        measured = part["found"].get("measured")
        if name.startswith(_PART) and measured:
            target = folder / f"{name.removeprefix(_PART)}.svg"
            _plot_shape(name.removeprefix(_PART), measured, target)
            written.append(target)
    return written


def _plot_shape(name: str, measured: Mapping[str, Any], target: Path) -> None:
    figure = Figure(figsize=(13, 4), layout="constrained")
    over_rows, over_virtual, gains = figure.subplots(1, 3)
    cells = dict(_cells(measured))
    rows = {
        cell.rows: found
        for cell, found in cells.items()
        if cell.virtual_tokens == MAIN.virtual_tokens and cell.tasks == min(cell.rows, MAIN.tasks)
    }
    _draw(over_rows, rows, "rows")
    virtual = {
        cell.virtual_tokens: found
        for cell, found in cells.items()
        if (cell.rows, cell.tasks) == (MAIN.rows, MAIN.tasks)
    }
    _draw(over_virtual, virtual, "virtual tokens of each task")
    _draw_gains(gains, measured)
    figure.suptitle(name)
    save(figure, target)


def _cells(measured: Mapping[str, Any]) -> Iterator[tuple[Cell, Mapping[str, Any]]]:
    for name, found in measured.items():
        if (match := _CELL.fullmatch(name)) and "tokens_per_second" in found:
            yield Cell(*map(int, match.groups())), found


def _draw(axes: Axes, figures: Mapping[int, Mapping[str, Any]], what: str) -> None:
    """Tokens per second as a line, the share of t* written beside each point."""
    at = sorted(figures)
    rates = [figures[each]["tokens_per_second"]["median"] for each in at]
    places = range(len(at))
    axes.plot(places, rates, marker="o")
    for place, each, rate in zip(places, at, rates, strict=True):
        share = figures[each].get("of_limit")
        if share is not None:
            axes.annotate(f" {share:.2f} t*", (place, rate), va="bottom")
    axes.set_xticks(list(places), [str(each) for each in at])
    axes.margins(x=0.2, y=0.1)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(what)
    axes.set_ylabel("new tokens per second (median)")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_gains(axes: Axes, measured: Mapping[str, Any]) -> None:
    bars = {
        f"{part}{name.removeprefix('switches')}": found["gain"]["median"]
        for name, parts in measured.items()
        if name.startswith("switches")
        for part, found in parts.items()
        if "gain" in found
    }
    axes.barh(range(len(bars)), list(bars.values()))
    axes.set_yticks(range(len(bars)), list(bars))
    axes.axvline(1, color="#333333", linewidth=0.8)
    axes.set_xlabel("times as fast as without it")
    axes.spines[["top", "right"]].set_visible(False)
