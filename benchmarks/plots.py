"""Plots of a report as SVG: who is how fast, and what prompts and tasks cost."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

_OURS, _OTHERS = "#3b6fd4", "#9aa3ad"
# The same report gives the same bytes, and text stays text.
mpl.rcParams.update({"svg.hashsalt": "promptplex", "svg.fonttype": "none", "font.size": 10})


def plot_sides(report: Mapping[str, Any], target: Path) -> None:
    """A bar a side: median tokens per second, with quartiles."""
    sides = sorted(report["sides"].items(), key=lambda entry: entry[1]["tokens_per_second"]["median"])
    figure = Figure(figsize=(8.5, 0.9 + 0.42 * len(sides)), layout="constrained")
    axes = figure.subplots()
    for row, (label, side) in enumerate(sides):
        rate = side["tokens_per_second"]
        low, high = rate["quartiles"]
        error = [[rate["median"] - low], [high - rate["median"]]]
        colour = _OURS if label.startswith("Promptplex") else _OTHERS
        axes.barh(row, rate["median"], xerr=error, color=colour, ecolor="#333333", capsize=3)
        axes.annotate(f" {rate['median']:.0f}", (high, row), va="center")
    axes.set_yticks(range(len(sides)), [label for label, _ in sides])
    axes.set_xlabel(f"new tokens per second (median and quartiles), {_title(report)}")
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, target)


def plot_sweep(points: Mapping[int, Mapping[int, float]], report: Mapping[str, Any], target: Path) -> None:
    """Lines of our throughput over virtual tokens, one for each number of tasks.

    `points`: tasks -> virtual tokens -> median tokens per second.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for tasks, line in sorted(points.items()):
        at = sorted(line)
        axes.plot(at, [line[p] for p in at], marker="o", label=f"{tasks} task{'s' if tasks > 1 else ''}")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("virtual tokens of each task's prompt")
    axes.set_ylabel("new tokens per second (median)")
    axes.set_title(_title(report), fontsize=10)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, target)


def _title(report: Mapping[str, Any]) -> str:
    work, parameters = report["work"], report["hardware"]["parameters"]
    return f"{parameters / 1e6:.0f}M bf16, {work['prompt_tokens']} in, {work['new_tokens']} out"


def save(figure: Figure, target: Path) -> None:
    """Write an SVG."""
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, format="svg", metadata={"Date": None})
