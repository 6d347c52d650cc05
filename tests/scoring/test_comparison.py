"""Paired differences, and what counts as better and as not worse."""

import numpy as np
import pytest

from app.scoring.comparison import Difference, Pairs, compare
from app.scoring.items import Item, Outcome
from app.scoring.measures import Measures
from app.scoring.metric import mean
from tests.scoring.outcomes import measure_texts


def right(count: int, total: int, *, first: int = 0) -> Measures:
    """Exactness of `total` texts, right from number `first` on."""
    said = ["x" if first <= number < first + count else "no" for number in range(total)]
    return measure_texts(said, ["x"] * total)


def test_mcnemars_exact_test_is_that_of_a_fair_coin() -> None:
    assert Pairs(5, 6, 0, 9).p_value() == pytest.approx(2 / 64)
    assert Pairs(5, 8, 2, 9).p_value() == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert Pairs(5, 3, 3, 9).p_value() == 1
    assert Pairs(5, 0, 0, 9).p_value() == 1


def test_newcombes_interval() -> None:
    # Newcombe (1998), Statistics in Medicine 17, table II: method 10 of (36, 12, 2, 0).
    assert Pairs(36, 12, 2, 0).lowest_difference() == pytest.approx(0.0569, abs=1e-4)
    assert Pairs(100, 0, 0, 0).lowest_difference() == pytest.approx(-0.037, abs=1e-4)


def test_pairs_are_counted_line_by_line() -> None:
    found = compare(right(6, 10), right(3, 10, first=4))["exact"]
    assert found.pairs == Pairs(both=2, first=4, second=1, neither=3)
    assert found.value == pytest.approx(0.3)


def test_the_interval_of_a_paired_difference_is_near_the_normal_one() -> None:
    found = compare(right(300, 500), right(260, 500, first=100))["exact"]
    each = np.array([1] * 100 + [0] * 200 + [-1] * 60 + [0] * 140)
    spread = 1.96 * each.std() / np.sqrt(500)
    assert found.interval == pytest.approx((each.mean() - spread, each.mean() + spread), abs=2e-3)


def test_the_same_answers_differ_by_nothing() -> None:
    long = ["the old door is by the river house", "a thai dog runs by the house and sits"] * 10
    found = compare(measure_texts(long, long[::-1]), measure_texts(long, long[::-1]))
    assert {each.interval for each in found.values()} == {(0.0, 0.0)}
    assert set(found) >= {"bleu", "rougeL", "f1", "exact"}
    assert all(each.why_not_better() for each in found.values())


@pytest.mark.parametrize(
    ("first", "second", "why"),
    [
        (right(30, 60), right(10, 60), ""),
        (right(10, 60), right(30, 60), "does not lie above 0"),
        (right(15, 60), right(10, 60), "p = 0.062"),  # five lines, all won: 2 / 2^5
        (right(1, 1), right(0, 1), "p = 1.000"),
    ],
)
def test_better_needs_the_interval_and_mcnemar(first: Measures, second: Measures, why: str) -> None:
    found = compare(first, second)["exact"].why_not_better()
    assert why in found
    assert bool(why) == bool(found)


def test_not_worse_needs_enough_lines_for_its_margin() -> None:
    assert "-0.037" in compare(right(100, 100), right(100, 100))["exact"].why_worse(0.03)
    assert not compare(right(100, 100), right(100, 100))["exact"].why_worse(0.04)
    assert compare(right(50, 100), right(60, 100))["exact"].why_worse(0.05)


def difference(count: int, *, is_loss: bool) -> Difference:
    one, other = ([low + 0.001 * number for number in range(count)] for low in (0.2, 0.5))
    pair = [Measures((mean("any", values, is_loss=is_loss),), "any") for values in (one, other)]
    return compare(*pair)["any"]


def test_of_a_loss_less_is_better() -> None:
    assert not difference(20, is_loss=True).why_not_better()
    assert difference(20, is_loss=False).why_not_better()


def test_a_mean_of_few_lines_promotes_nothing() -> None:
    assert "19 lines are too few" in difference(19, is_loss=True).why_not_better()
    assert "19 lines are too few" in difference(19, is_loss=True).why_worse(0.1)


def test_lines_without_an_answer_are_no_pairs() -> None:
    from app.scoring.measures import measure

    items = [Item(inputs="", expected="x", answer="x"), Item(inputs="", expected="y")]
    found = compare(
        measure([Outcome(item, "x") for item in items]), measure([Outcome(item, "") for item in items])
    )
    assert found["accuracy"].pairs == Pairs(0, 1, 0, 0)
