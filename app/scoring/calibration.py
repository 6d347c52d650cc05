"""Whether probabilities are right: of answers with a confidence of 0.8, four of five should be.

Shape: examples N.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.scoring.items import Outcome
from app.scoring.labels import accuracy, expected_label, macro_f1
from app.scoring.metric import Array, Metric, mean
from app.scoring.shares import Share

NUM_BINS = 15  # as Guo et al. (2017) have it
_LEAST = 1e-15  # a probability of 0 would make the mean loss infinite


def choice_metrics(outcomes: Sequence[Outcome], choices: Sequence[str]) -> list[Metric]:
    """Return accuracy and macro F1 of the most probable choices, Brier score and mean loss.

    The Brier score is the sum over the choices of squared errors (Brier, 1950): from 0 to 2. `nll` is the
    negative natural logarithm of the right choice's probability, which counts as at least 1e-15. An
    outcome without probabilities is wrong, and has no part in the last two.
    """
    wanted = [expected_label(outcome.item) for outcome in outcomes]
    found = [outcome.probabilities for outcome in outcomes]
    said = [None if each is None else most_probable(each) for each in found]
    pairs = list(zip(found, wanted, strict=True))
    brier = [None if each is None else _brier(each, label) for each, label in pairs]
    nll = [None if each is None else -math.log(max(each[label], _LEAST)) for each, label in pairs]
    return [
        accuracy("choices_accuracy", said, wanted),
        macro_f1("choices_macro_f1", said, wanted, choices),
        mean("brier", brier, is_loss=True),
        mean("nll", nll, is_loss=True),
    ]


def most_probable(probabilities: Mapping[str, float]) -> str:
    """Return the first of the most probable choices."""
    return max(probabilities, key=probabilities.__getitem__)


def _brier(probabilities: Mapping[str, float], expected: str) -> float:
    return sum((p - (choice == expected)) ** 2 for choice, p in probabilities.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """Answers of like confidence, above `low` and up to `high`."""

    low: float
    high: float
    confidence: float  # mean
    right: Share

    @property
    def gap(self) -> float:
        """Return how far accuracy is from confidence."""
        return abs(self.right.share - self.confidence)

    def as_json(self) -> dict[str, Any]:
        """Bounds, mean confidence, and the share of right answers."""
        bounds = {"low": round(self.low, 4), "high": round(self.high, 4)}
        return bounds | {"confidence": round(self.confidence, 4)} | self.right.as_json()


@dataclass(frozen=True, slots=True)
class Calibration:
    """The most probable choice of each of N examples: its probability, and whether it is right."""

    confidence: Array  # [N]
    is_right: NDArray[np.bool_]  # [N]

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> "Calibration":
        """Take the outcomes that have probabilities; one must."""
        found = [(outcome.probabilities, outcome.item) for outcome in outcomes if outcome.probabilities]
        said = [most_probable(probabilities) for probabilities, _ in found]
        return cls(
            np.array([probabilities[label] for (probabilities, _), label in zip(found, said, strict=True)]),
            np.array([expected_label(item) == label for (_, item), label in zip(found, said, strict=True)]),
        )

    def equal_width(self) -> list[Bin]:
        """Return the bins of equal width that hold examples."""
        places = np.clip(np.ceil(self.confidence * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
        return [
            self._bin(np.flatnonzero(places == place), place / NUM_BINS, (place + 1) / NUM_BINS)
            for place in np.unique(places)
        ]

    def adaptive(self) -> list[Bin]:
        """Return bins of equally many examples, in order of confidence (Nguyen and O'Connor, 2015)."""
        order = np.argsort(self.confidence, kind="stable")
        parts = np.array_split(order, min(NUM_BINS, len(order)))
        return [self._bin(part, *self.confidence[part[[0, -1]]]) for part in parts]

    def _bin(self, chosen: NDArray[np.intp], low: float, high: float) -> Bin:
        right = Share(int(self.is_right[chosen].sum()), len(chosen))
        confidence = float(self.confidence[chosen].mean())
        return Bin(low=float(low), high=float(high), confidence=confidence, right=right)

    def as_json(self) -> dict[str, Any]:
        """Both errors, and the bins of equal width."""
        return {
            "ece_equal_width": round(calibration_error(self.equal_width()), 4),
            "ece_adaptive": round(calibration_error(self.adaptive()), 4),
            "bins": [each.as_json() for each in self.equal_width()],
        }


def calibration_error(bins: Sequence[Bin]) -> float:
    """Return the expected calibration error: the mean gap, each bin weighted by its examples."""
    total = sum(each.right.total for each in bins)
    return sum(each.gap * each.right.total for each in bins) / total
