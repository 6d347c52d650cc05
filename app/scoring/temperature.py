"""Temperature scaling (Guo et al., 2017): one number makes labels as probable as they are right.

Shapes: examples N, labels C.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from app.scoring.bootstrap import SEED
from app.scoring.calibration import Calibration, calibration_error, choice_metrics
from app.scoring.items import Outcome
from app.scoring.labels import expected_label
from app.scoring.metric import Array

LEAST, MOST = 0.01, 100.0  # the temperatures that are looked at
MIN_LINES = 10
_ROUNDS = 60
_GOLDEN = (math.sqrt(5) - 1) / 2
_TINY = 1e-300


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationErrors:
    """How far probabilities are from what is right."""

    ece: float  # 15 bins of equal width
    brier: float
    nll: float

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> "CalibrationErrors":
        """Measure outcomes, all of which have probabilities of the same labels."""
        labels = [*(outcomes[0].probabilities or {})]
        values = {metric.name: metric.value for metric in choice_metrics(outcomes, labels)}
        ece = calibration_error(Calibration.of(outcomes).equal_width())
        return cls(ece=ece, brier=values["brier"], nll=values["nll"])

    def as_json(self) -> dict[str, float]:
        """Return all of them."""
        return {"ece": round(self.ece, 4), "brier": round(self.brier, 4), "nll": round(self.nll, 4)}

    def __str__(self) -> str:
        return f"ECE {self.ece:.3f}, Brier score {self.brier:.3f}, NLL {self.nll:.3f}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TemperatureFit:
    """The temperature with the least negative log-likelihood, and what it does.

    `after` is honest: each half of the lines is measured at the temperature that fits the other half.
    """

    temperature: float
    num_lines: int
    before: CalibrationErrors
    after: CalibrationErrors
    is_at_bound: bool

    def as_json(self) -> dict[str, Any]:
        """Return what a manifest's `calibration` is, and the errors before and after."""
        return {
            "calibration": {"temperature": self.temperature},
            "lines": self.num_lines,
            "before": self.before.as_json(),
            "after": self.after.as_json(),
        }


def fit_temperature(outcomes: Sequence[Outcome], current: float) -> TemperatureFit:
    """Fit the temperature of outcomes with probabilities, which came of the `current` one.

    Raise ValueError where there are too few of them.
    """
    answered = [outcome for outcome in outcomes if outcome.probabilities]
    if len(answered) < MIN_LINES:
        raise ValueError(
            f"--fit-calibration needs at least {MIN_LINES} lines with probabilities; here are {len(answered)}"
        )
    fitted = _fit(answered) * current
    order = np.random.default_rng(SEED).permutation(len(answered))  # files have orders of their own
    first, second = ([answered[place] for place in places] for places in np.array_split(order, 2))
    of_first, of_second = _fit(first), _fit(second)
    crossed = [tempered(outcome, of_second) for outcome in first]
    crossed += [tempered(outcome, of_first) for outcome in second]
    return TemperatureFit(
        temperature=round(fitted, 4),
        num_lines=len(answered),
        before=CalibrationErrors.of(answered),
        after=CalibrationErrors.of(crossed),
        is_at_bound=not 1.01 * LEAST < fitted / current < 0.99 * MOST,
    )


def tempered(outcome: Outcome, temperature: float) -> Outcome:
    """Return the outcome with the logarithms of its probabilities divided by a temperature."""
    found = outcome.probabilities or {}
    levels = np.log(np.maximum([*found.values()], _TINY)) / temperature
    weights = np.exp(levels - levels.max())
    values: list[float] = (weights / weights.sum()).tolist()
    return replace(outcome, probabilities=dict(zip(found, values, strict=True)))


def _fit(outcomes: Sequence[Outcome]) -> float:
    """Search the temperature with the least loss, which has one minimum, by golden sections."""
    found: list[Mapping[str, float]] = [outcome.probabilities or {} for outcome in outcomes]
    logs = np.log(np.maximum([[*each.values()] for each in found], _TINY))  # [N, C]
    right = np.array([[*each].index(expected_label(o.item)) for each, o in zip(found, outcomes, strict=True)])
    low, high = math.log(LEAST), math.log(MOST)
    for _ in range(_ROUNDS):
        near, far = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        if _loss(logs, right, math.exp(near)) <= _loss(logs, right, math.exp(far)):
            high = far
        else:
            low = near
    return math.exp((low + high) / 2)


def _loss(logs: Array, right: Any, temperature: float) -> float:
    """Return the mean negative log-likelihood of the right labels; `right` holds their places, [N]."""
    levels = logs / temperature
    highest = levels.max(axis=1, keepdims=True)
    totals = np.log(np.exp(levels - highest).sum(axis=1)) + highest[:, 0]
    return float((totals - levels[np.arange(len(right)), right]).mean())
