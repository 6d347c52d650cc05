"""Curves of a run: thinned for provenance, drawn as SVG for a page."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.figure import Figure

from app.training.run import History

_COLOURS = ("#3b6fd4", "#d4773b", "#3ba36a", "#9a5bd0", "#9aa3ad")
_SIZE = (6.4, 2.9)  # inches
_SVG = re.compile(r"<svg.*</svg>", re.DOTALL)
_METADATA = re.compile(r"\s*<metadata>.*?</metadata>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Curve:
    """Values over steps."""

    steps: Sequence[int]
    values: Sequence[float]

    def thinned(self, most: int) -> "Curve":
        """Return at most so many points: the mean of each stretch, at its last step."""
        size = -(-len(self.steps) // most) or 1
        starts = range(0, len(self.steps), size)
        means = [_mean(self.values[start : start + size]) for start in starts]
        return Curve([self.steps[min(start + size, len(self.steps)) - 1] for start in starts], means)


def curves_of(history: History) -> dict[str, Curve]:
    """Return the loss, and of the dev set the loss and each score: `dev loss`, `dev exact`."""
    found = {}
    if steps := history.steps:
        found["loss"] = Curve([each.step for each in steps], [each.loss for each in steps])
    if looks := history.looks:
        numbers = [look.step for look in looks]
        found["dev loss"] = Curve(numbers, [look.loss for look in looks])
        for name in looks[0].scores:
            found[f"dev {name}"] = Curve(numbers, [look.scores[name] for look in looks])
    return found


def curve_svg(
    curves: Mapping[str, Curve], title: str, *, best_step: int | None = None, number: int = 0
) -> str:
    """Return one `<svg>` element with all curves; `number` keeps the ids of a page's figures apart."""
    with mpl.rc_context():
        # The same run gives the same bytes, and text stays text.
        salt = f"promptplex {number}"
        mpl.rcParams.update({"svg.hashsalt": salt, "svg.fonttype": "none", "font.size": 9})
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        for (name, curve), colour in zip(curves.items(), _COLOURS, strict=False):
            marker = "o" if len(curve.steps) <= 40 else ""
            axes.plot(curve.steps, curve.values, color=colour, label=name, marker=marker, markersize=3)
        if best_step is not None:
            axes.axvline(best_step, color="#9aa3ad", linewidth=1, linestyle="--")
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(curves) > 1:
            axes.legend(frameon=False)
        return _inline(figure, title)


def _inline(figure: Figure, title: str) -> str:
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    found = _SVG.search(written.getvalue())
    assert found is not None
    element = _METADATA.sub("", found[0])
    return element.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
