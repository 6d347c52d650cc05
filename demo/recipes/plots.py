"""A plot of what votes gain, as SVG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from demo.recipes.program_tables import EXPRESSIONS

# The same figures give the same bytes, and text stays text.
mpl.rcParams.update({"svg.hashsalt": "promptplex", "svg.fonttype": "none", "font.size": 10})


def plot_votes(votes: Mapping[str, Any], target: Path) -> None:
    """Accuracy over the number of ballots, with 95% intervals; dashed: one greedy answer."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for number, (name, found) in enumerate(votes.items()):
        sizes = [int(n) for n in found["votes"]]
        shares = [each["share"] for each in found["votes"].values()]
        bounds = [each["interval_95"] for each in found["votes"].values()]
        lows = [share - low for share, (low, _) in zip(shares, bounds, strict=True)]
        highs = [high - share for share, (_, high) in zip(shares, bounds, strict=True)]
        colour = f"C{number}"
        task, kind = name.split(" on ")
        label = f"{task}: {EXPRESSIONS[kind].partition(',')[0]}, temperature {found['temperature']}"
        axes.errorbar(sizes, shares, yerr=[lows, highs], color=colour, marker="o", capsize=3, label=label)
        axes.axhline(found["greedy"]["share"], color=colour, linestyle="--", linewidth=1)
    axes.set_xticks(sizes)
    axes.set_xlabel("ballots (dashed: one greedy answer)")
    axes.set_ylabel("right answers")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, format="svg", metadata={"Date": None})
