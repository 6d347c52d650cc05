"""Labels in outputs, and macro F1 by hand."""

import pytest

from app.scoring.items import Item
from app.scoring.labels import label_in, labels_of, macro_f1

LABELS = ("positive", "not positive", "mixed")


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (" Positive.\n", "positive"),
        ("it is not positive", "not positive"),
        ("unpositive", None),
        ("positive, I think", None),
        ("", None),
    ],
)
def test_the_longest_label_at_the_end_counts(text: str, label: str | None) -> None:
    assert label_in(text, LABELS) == label


def test_macro_f1_by_hand() -> None:
    expected = ["a", "a", "a", "b", "b", "c"]
    predicted = ["a", "a", "b", "b", None, None]
    # a: precision 2/2, recall 2/3; b: 1/2 and 1/2; c: never predicted; d: neither, and doesn't count.
    assert macro_f1("x", predicted, expected, "abcd").value == pytest.approx((0.8 + 0.5 + 0) / 3)


def test_an_answer_within_a_text_makes_no_labels() -> None:
    items = [Item(inputs="", expected=f"so {n % 2}", answer=str(n % 2)) for n in range(40)]
    assert labels_of(items) == ()
    assert labels_of(items, ("0", "1")) == ("0", "1")
