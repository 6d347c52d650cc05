"""Which metrics data of a kind gets, and their values and intervals."""

import pytest

from app.scoring.items import Item, Outcome
from app.scoring.measures import Measures, measure
from tests.scoring.outcomes import measure_texts

LONG = "the blue door is a thai place by the river"


def outcome(generated: str, expected: str = "", **fields: object) -> Outcome:
    return Outcome(Item(inputs="", expected=expected, **fields), generated)


def names(measures: Measures) -> list[str]:
    return [metric.name for metric in measures.metrics]


def test_slots_are_counted_one_by_one_and_all_together() -> None:
    slots = ("The Eagle", "Thai")
    found = measure([outcome("The Eagle serves Thai food.", slots=slots), outcome("The Eagle.", slots=slots)])
    shares = {metric.name: metric.share for metric in found.metrics if metric.is_share}
    assert (shares["every_slot"].count, shares["every_slot"].total) == (1, 2)
    assert (shares["slot_values"].count, shares["slot_values"].total) == (3, 4)
    assert found.main == "every_slot"


def test_accuracy_counts_the_items_that_have_an_answer() -> None:
    found = measure([outcome("a", "a"), outcome("b", "b", answer="b"), outcome("c", "x", answer="c")])
    scores = found.scores()
    assert list(scores) == ["exact", "accuracy", "f1"]
    assert scores["exact"].as_json() == {
        "count": 2,
        "total": 3,
        "share": 0.6667,
        "interval_95": [0.2077, 0.9385],
    }
    assert (scores["accuracy"].metric.share.count, scores["accuracy"].metric.share.total) == (2, 2)
    assert found.main == "accuracy"


@pytest.mark.parametrize(
    ("expected", "choices", "found", "main"),
    [
        (["yes", "no"] * 5, (), ["exact", "accuracy", "macro_f1"], "accuracy"),
        (["yes", "no"], ("no", "yes", "perhaps"), ["exact", "accuracy", "macro_f1"], "accuracy"),
        (["Ann Hill", "Bo Lee", "Cy"], (), ["exact", "f1"], "exact"),
        (["yes", "no"], ("positive", "negative"), ["exact", "f1"], "exact"),
        ([LONG] * 3, (), ["exact", "f1", "bleu", "rouge1", "rouge2", "rougeL"], "rougeL"),
        (["파란 문은 강가에 있는 태국 식당이다"] * 3, (), ["exact", "f1", "bleu"], "bleu"),
    ],
)
def test_metrics_follow_the_expected_texts(
    expected: list[str], choices: tuple[str, ...], found: list[str], main: str
) -> None:
    measures = measure_texts(expected, expected, choices)
    assert names(measures) == found
    assert measures.main == main
    assert measures.values == {name: pytest.approx(1) for name in found}
    assert len(measures.notes) == (main == "bleu")


def test_texts_with_answers_are_not_long_texts() -> None:
    steps = "4 + 5 = 9; 3 * 9 = 27; answer: 27"
    assert names(measure([outcome(steps, steps, answer="27")])) == ["exact", "accuracy", "f1"]


def test_a_refused_request_is_wrong_in_every_metric() -> None:
    item = Item(inputs="", expected=LONG, slots=("blue",))
    refused = measure([Outcome(item, "", error="too long")] * 2)
    assert set(refused.values.values()) == {0.0}


def test_intervals_are_the_same_in_each_run_and_hold_the_value() -> None:
    texts = [LONG, "a red house", "the blue door is by the river", "no"] * 5
    measures = measure_texts(texts, [LONG] * 20)
    first, second = measures.scores(resamples=500), measures.scores(resamples=500)
    assert first == second
    for score in first.values():
        low, high = score.interval
        assert low < score.metric.value < high


def test_nothing_can_not_be_measured() -> None:
    with pytest.raises(ValueError, match="no outcomes"):
        measure([])
