"""The goals that the GPU's path was built for, and whether a report meets them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from benchmarks.gpu.throughput import MAIN, ONE
from benchmarks.peft_sides import PeftGrouped

_MEDIAN = ("ratio", "median")
_SMALL, _LARGE = "throughput qwen2-0.5b", "throughput llama3-8b"


class Goal(NamedTuple):
    """A bound for one figure of a report."""

    what: str
    part: str
    path: tuple[str, ...]  # below the part's measurements
    bound: float
    is_at_most: bool = False

    def value(self, report: Mapping[str, Any]) -> float | None:
        """Return the figure; None where it wasn't measured."""
        found: Any = report["parts"].get(self.part, {}).get("found", {}).get("measured", {})
        for name in self.path:
            found = found.get(name) if isinstance(found, Mapping) else None
        return None if found is None else float(found)

    def is_met(self, report: Mapping[str, Any]) -> bool | None:
        """Return whether the bound holds; None where nothing was measured."""
        value = self.value(report)
        if value is None:
            return None
        return value <= self.bound if self.is_at_most else value >= self.bound


GOALS = (
    Goal("8B, 64 rows: of t* in a decode step", _LARGE, (MAIN.name, "of_limit"), 0.8),
    Goal("0.5B, one row: of t* in a decode step", _SMALL, (ONE.name, "of_limit"), 0.5),
    Goal("8B, 64 rows: times PEFT, grouped by task", _LARGE, ("peers", PeftGrouped.name, *_MEDIAN), 30),
    Goal(
        "0.5B, 64 rows: times PEFT, grouped by task",
        _SMALL,
        ("peers", PeftGrouped.name, *_MEDIAN),
        30,
    ),
    Goal("8B, 64 rows: 8 tasks beside one", _LARGE, ("tasks", *_MEDIAN), 0.99),
    Goal("0.5B, 64 rows: 8 tasks beside one", _SMALL, ("tasks", *_MEDIAN), 0.99),
    Goal("8B: first token, p 2000 beside none", _LARGE, ("first token", *_MEDIAN), 1.05, True),
    Goal("0.5B: first token, p 2000 beside none", _SMALL, ("first token", *_MEDIAN), 1.05, True),
)


def goals_json(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return every goal with its figure."""
    return [
        {"goal": goal.what, "bound": goal.bound, "value": goal.value(report), "is met": goal.is_met(report)}
        for goal in GOALS
    ]
