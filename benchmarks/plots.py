"""Plots of a report as SVG: the sides of the main work, and how rates grow with rows."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

_OURS, _OTHERS = "#3b6fd4", "#9aa3ad"
_MAIN = "rows-32"
# The same report gives the same bytes, and text stays text.
mpl.rcParams.update({"svg.hashsalt": "promptplex", "svg.fonttype": "none", "font.size": 10})


def plot_report(report: Mapping[str, Any], folder: Path) -> None:
    """Write those plots whose works the report has."""
    works = report["works"]
    if _MAIN in works:
        plot_sides(works[_MAIN], folder / "throughput.svg")
    if rows := [work for name, work in works.items() if name.startswith("rows-")]:
        plot_rows(rows, folder / "rows.svg")


def plot_sides(work: Mapping[str, Any], target: Path) -> None:
    """A bar a side: median tokens per second, with quartiles."""
    sides = sorted(work["sides"].items(), key=lambda entry: entry[1]["per_second"]["median"])
    figure = Figure(figsize=(8.5, 0.9 + 0.42 * len(sides)), layout="constrained")
    axes = figure.subplots()
    for row, (name, side) in enumerate(sides):
        rate = side["per_second"]
        low, high = rate["quartiles"]
        error = [[rate["median"] - low], [high - rate["median"]]]
        colour = _OURS if name == "Promptplex" else _OTHERS
        axes.barh(row, rate["median"], xerr=error, color=colour, ecolor="#333333", capsize=3)
        axes.annotate(f" {rate['median']:.0f}", (high, row), va="center")
    axes.set_yticks(range(len(sides)), [name for name, _ in sides])
    axes.set_xlabel(f"new tokens per second (median and quartiles): {work['description']}")
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, target)


def plot_rows(works: "list[Mapping[str, Any]]", target: Path) -> None:
    """A line for each side that did all of these works: median tokens per second over concurrent requests."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    at = [work["work"]["requests"] for work in works]
    for name in works[0]["sides"]:
        if all(name in work["sides"] for work in works):
            rates = [work["sides"][name]["per_second"]["median"] for work in works]
            axes.plot(at, rates, marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(at, [str(each) for each in at])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("concurrent requests")
    axes.set_ylabel("new tokens per second (median)")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, target)


def save(figure: Figure, target: Path) -> None:
    """Write an SVG."""
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, format="svg", metadata={"Date": None})
