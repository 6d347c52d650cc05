"""Two answers to the same inputs: is one side better, or not worse, and how sure is that?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from app.scoring.bootstrap import RESAMPLES, SEED, percentile_interval, resampled_values
from app.scoring.measures import Measures
from app.scoring.metric import Metric
from app.scoring.shares import Share

SIGNIFICANT = 0.05
MIN_EXAMPLES = 20  # a bootstrap of fewer says little about what it hasn't seen


@dataclass(frozen=True, slots=True)
class Pairs:
    """Examples by who was right."""

    both: int
    first: int  # alone
    second: int  # alone
    neither: int

    def p_value(self) -> float:
        """Return McNemar's exact test (1947), two-sided: a fair coin for each example that only one got."""
        differing, fewer = self.first + self.second, min(self.first, self.second)
        tail = sum(math.comb(differing, count) for count in range(fewer + 1))
        return min(1.0, tail / 2 ** (differing - 1)) if differing else 1.0

    def lowest_difference(self) -> float:
        """Return the lower end of Newcombe's 95% interval for paired shares (1998, method 10).

        Unlike a bootstrap's it is below 0 where all examples are ties, the more the fewer there are.
        """
        total = self.both + self.first + self.second + self.neither
        one, other = Share(self.both + self.first, total), Share(self.both + self.second, total)
        down, up = one.share - one.interval()[0], other.interval()[1] - other.share
        spread = down**2 - 2 * self._correlation() * down * up + up**2
        return one.share - other.share - math.sqrt(max(0.0, spread))

    def _correlation(self) -> float:
        total = self.both + self.first + self.second + self.neither
        product = float(self.both * self.neither - self.first * self.second)
        if product > 0:
            product = max(product - total / 2, 0)
        margins = (self.both + self.first) * (self.second + self.neither)
        margins *= (self.both + self.second) * (self.first + self.neither)
        return product / math.sqrt(margins) if margins else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A metric of both sides; `interval` is that of first minus second, 95%."""

    first: Metric
    second: Metric
    interval: tuple[float, float]

    @property
    def value(self) -> float:
        """First minus second."""
        return self.first.value - self.second.value

    @property
    def pairs(self) -> Pairs | None:
        """Return who was right; None for a metric that isn't right or wrong, example by example."""
        one, other = self.first.rows, self.second.rows
        if not self.first.is_share or one[:, 1].max() > 1:
            return None
        counted = one[:, 1] > 0
        mine, theirs = one[counted, 0] > 0, other[counted, 0] > 0
        kinds = (mine & theirs, mine & ~theirs, ~mine & theirs, ~mine & ~theirs)
        return Pairs(*(int(np.count_nonzero(kind)) for kind in kinds))

    def why_not_better(self) -> str:
        """Return why the first side isn't better; empty: it is.

        It is better where the interval lies above 0, and, for a share, where McNemar's test agrees.
        """
        if self._least <= 0:
            return "the interval of the difference does not lie above 0"
        if self.pairs is not None and self.pairs.p_value() >= SIGNIFICANT:
            return f"McNemar's test gives p = {self.pairs.p_value():.3f}, not below {SIGNIFICANT}"
        return self._too_few()

    def why_worse(self, margin: float) -> str:
        """Return why the first side may be worse by more than the margin; empty: it isn't.

        The interval must lie above -margin, and, for a share, Newcombe's too.
        """
        least = self._least
        if self.pairs is not None:
            least = min(least, self.pairs.lowest_difference())
        if least <= -margin:
            return f"the difference may be {least:+.3f}, below the margin of {-margin:+.3f}"
        return self._too_few()

    @property
    def _least(self) -> float:
        """How much better the first side is at least; of a loss, less is better."""
        return -self.interval[1] if self.first.is_loss else self.interval[0]

    def _too_few(self) -> str:
        count = len(self.first.rows)
        if self.pairs is not None or count >= MIN_EXAMPLES:
            return ""
        return f"{count} lines are too few for {self.first.name}; {MIN_EXAMPLES} are needed"

    def as_json(self) -> dict[str, Any]:
        """Both values, the difference with its interval, and McNemar's p for a share."""
        found: dict[str, Any] = {
            "candidate": round(self.first.value, 4),
            "against": round(self.second.value, 4),
            "difference": round(self.value, 4),
            "interval_95": [round(bound, 4) for bound in self.interval],
        }
        if self.pairs is not None:
            found["mcnemar_p"] = round(self.pairs.p_value(), 4)
        return found | ({"signature": self.first.signature} if self.first.signature else {})


def compare(
    first: Measures, second: Measures, *, resamples: int = RESAMPLES, seed: int = SEED
) -> dict[str, Difference]:
    """Compare the metrics that both sides have, by the paired bootstrap: both see the same resamples."""
    theirs = {metric.name: metric for metric in second.metrics}
    mine = [metric for metric in first.metrics if metric.name in theirs]
    metrics: Sequence[Metric] = [*mine, *(theirs[metric.name] for metric in mine)]
    drawn = resampled_values(metrics, resamples=resamples, seed=seed)
    found = {}
    for metric, one, other in zip(mine, drawn, drawn[len(mine) :], strict=False):
        interval = percentile_interval(one - other)
        found[metric.name] = Difference(first=metric, second=theirs[metric.name], interval=interval)
    return found
