"""Curves of a run, drawn as SVG for a page."""

import io
import re
from collections.abc import Mapping

import matplotlib as mpl
from matplotlib.figure import Figure

from app.training.curves import Curve

_COLOURS = ("#3b6fd4", "#d4773b", "#3ba36a", "#9a5bd0", "#9aa3ad")
_SIZE = (6.4, 2.9)  # inches
_SVG = re.compile(r"<svg.*</svg>", re.DOTALL)
_METADATA = re.compile(r"\s*<metadata>.*?</metadata>", re.DOTALL)


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
