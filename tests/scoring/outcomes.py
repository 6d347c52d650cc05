"""Outcomes of texts, without inputs."""

from collections.abc import Sequence

from app.scoring.items import Item, Outcome
from app.scoring.measures import Measures, measure


def measure_texts(said: Sequence[str], wanted: Sequence[str], choices: Sequence[str] = ()) -> Measures:
    """Measure texts beside those that are right, one for one."""
    pairs = zip(said, wanted, strict=True)
    return measure([Outcome(Item(inputs="", expected=right), text) for text, right in pairs], choices)
