"""Temperature scaling: what made probabilities too sure is found again."""

import numpy as np
import pytest

from app.scoring.items import Item, Outcome
from app.scoring.temperature import LEAST, fit_temperature, tempered


def outcomes_of(temperature: float, count: int = 1000) -> list[Outcome]:
    """Outcomes whose labels are drawn as they should be, and stated as if divided by a temperature."""
    dice = np.random.default_rng(0)
    found = []
    for levels in dice.normal(size=(count, 3)):
        right = np.exp(levels) / np.exp(levels).sum()
        label = "abc"[dice.choice(3, p=right)]
        item = Item(inputs="x", expected=label)
        stated = dict(zip("abc", map(float, right), strict=True))
        found.append(tempered(Outcome(item, "", probabilities=stated), temperature))
    return found


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_the_temperature_that_was_taken_away_is_fitted(temperature: float) -> None:
    fit = fit_temperature(outcomes_of(temperature), 1.0)
    assert fit.temperature == pytest.approx(1 / temperature, rel=0.1)
    assert fit.after.nll <= fit.before.nll + 0.01  # what half of the lines cost where nothing is to be gained
    assert not fit.is_at_bound
    assert fit_temperature(outcomes_of(temperature), 3.0).temperature == pytest.approx(
        3 * fit.temperature, rel=1e-3
    )


def test_lines_without_a_mistake_say_nothing_of_certainty() -> None:
    sure = [Outcome(Item(inputs="x", expected="a"), "", probabilities={"a": 0.6, "b": 0.4})] * 10
    fit = fit_temperature(sure, 1.0)
    assert fit.is_at_bound
    assert fit.temperature == pytest.approx(LEAST, rel=0.01)
    with pytest.raises(ValueError, match="at least 10"):
        fit_temperature(sure[:9], 1.0)
