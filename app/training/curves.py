"""Curves of a run: loss and scores over its steps, thinned for provenance and for clients."""

from collections.abc import Sequence
from dataclasses import dataclass

from app.training.run import History


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


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
