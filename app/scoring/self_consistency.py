"""Self-consistency (Wang et al., 2022): how many answers are right by the majority of n ballots.

One set of N ballots for each example gives the whole curve: the first n of them are the vote of n.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from app.scoring.items import Outcome
from app.scoring.pictures import save_figure
from app.scoring.shares import Share


@dataclass(frozen=True, slots=True)
class Point:
    """What the majority of `num_ballots` is worth."""

    num_ballots: int
    right: Share

    def as_json(self) -> dict[str, Any]:
        """Return the number of ballots, and the share with its interval."""
        return {"ballots": self.num_ballots} | self.right.as_json()


def majority(answers: Sequence[str]) -> str:
    """Return the words of the most frequent answer, of equal ones the earliest; empty ones abstain."""
    counts = Counter(words for answer in answers if (words := " ".join(answer.split())))
    return max(counts, key=counts.__getitem__, default="")


def self_consistency(outcomes: Sequence[Outcome]) -> list[Point]:
    """Return a point for 1, 3, 5, ... ballots and for all of them; a refused request is wrong."""
    most = max(len(outcome.ballots) for outcome in outcomes)
    sizes = [*range(1, most, 2), most]
    return [
        Point(size, Share(sum(_is_right(each, size) for each in outcomes), len(outcomes))) for size in sizes
    ]


def _is_right(outcome: Outcome, num_ballots: int) -> bool:
    voted = replace(outcome, generated=majority(outcome.ballots[:num_ballots]))
    if outcome.item.answer is not None:
        return voted.is_right
    return outcome.error is None and voted.generated == " ".join(outcome.item.expected.split())


def curve_lines(points: Sequence[Point]) -> list[str]:
    """Return the curve as a table, a line for each point."""
    rows = [f"{'ballots':>7} {'right':>14}  accuracy"]
    for each in points:
        low, high = each.right.interval()
        counts = f"{each.right.count} of {each.right.total}"
        rows.append(f"{each.num_ballots:>7} {counts:>14}  {each.right.share:>7.1%}  [{low:.1%}, {high:.1%}]")
    return rows


def save_curve(points: Sequence[Point], path: Path, title: str) -> None:
    """Draw accuracy over the number of ballots, with 95% intervals."""
    from matplotlib.figure import Figure

    sizes, shares = [each.num_ballots for each in points], [each.right.share for each in points]
    lows, highs = zip(*(each.right.interval() for each in points), strict=True)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.fill_between(sizes, lows, highs, color="#9ecae1", alpha=0.5)
    axes.plot(sizes, shares, "o-", color="#08519c")
    axes.set(xlabel="ballots", ylabel="accuracy of the majority", xticks=sizes, title=title)
    save_figure(figure, path)
