"""Outputs as labels: which one an output names, accuracy, and macro F1."""

from collections.abc import Sequence

import numpy as np

from app.scoring.items import Item, ends_with
from app.scoring.metric import Array, Metric, share

_MOST_WORDS = 5  # in a label
_LEAST_REPEATS = 5  # of a label, on average


def labels_of(items: Sequence[Item], choices: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the labels that the items expect; none where the expected texts are no labels.

    Those are the task's choices if all that is expected is among them; else the expected texts
    themselves where they are the whole answer, few, short, and stand in five items each, on average.
    """
    expected = {expected_label(item) for item in items}
    if choices and expected <= set(choices):
        return tuple(choices)
    is_all = all(expected_label(item) == item.expected.strip() for item in items)
    is_few = 2 <= len(expected) <= len(items) / _LEAST_REPEATS
    is_short = all(1 <= len(text.split()) <= _MOST_WORDS for text in expected)
    return tuple(sorted(expected)) if is_all and is_few and is_short else ()


def expected_label(item: Item) -> str:
    """Return the answer that the item names, else its whole expected text."""
    return (item.expected if item.answer is None else item.answer).strip()


def label_in(text: str, labels: Sequence[str]) -> str | None:
    """Return the longest label that the text ends with; None where there is none."""
    return max((label for label in labels if ends_with(text, label)), key=len, default=None)


def accuracy(name: str, predicted: Sequence[str | None], expected: Sequence[str]) -> Metric:
    """Return the share of right labels; None is wrong."""
    return share(name, [(int(said == wanted), 1) for said, wanted in zip(predicted, expected, strict=True)])


def macro_f1(
    name: str, predicted: Sequence[str | None], expected: Sequence[str], labels: Sequence[str]
) -> Metric:
    """Return the mean F1 of all labels that are expected or predicted; None lowers a label's recall."""
    said = np.array([[text == label for label in labels] for text in predicted])  # [N, labels]
    wanted = np.array([[text == label for label in labels] for text in expected])
    rows = np.hstack([said & wanted, said, wanted]).astype(np.float64)
    return Metric(name=name, rows=rows, of_sums=_macro_f1_of_sums)


def _macro_f1_of_sums(sums: Array) -> Array:
    right, said, wanted = np.split(sums, 3, axis=-1)
    occurs = said + wanted > 0
    scores = np.divide(2 * right, said + wanted, out=np.zeros_like(right), where=occurs)
    average: Array = scores.sum(axis=-1) / np.maximum(occurs.sum(axis=-1), 1)
    return average
