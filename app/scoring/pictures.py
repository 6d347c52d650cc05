"""Charts as files: the same data gives the same bytes."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURES = (".svg", ".png")


def check_picture(path: Path) -> None:
    """Raise ValueError where no picture can be drawn: matplotlib is missing, or the path's ending is none."""
    if find_spec("matplotlib") is None:
        raise ValueError("a plot needs matplotlib: pip install 'promptplex[train]'")
    if path.suffix.lower() not in PICTURES:
        raise ValueError(f"{path}: a plot is written as {' or '.join(PICTURES)}; end its name in one of them")


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a chart in the format of the path's ending."""
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "promptplex"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix.lower() == ".svg" else None, dpi=150)
