"""Which metrics make sense for some data, and their values with 95% intervals.

| expected texts | metrics (the main one first) |
|---|---|
| labels | accuracy, exact, macro_f1 |
| labels that were also classified | choices_accuracy, choices_macro_f1, brier, nll; those of labels |
| texts with `answer` | accuracy, exact, f1 |
| texts with `slots` | every_slot, slot_values, exact, f1; bleu, rouge |
| long texts | rougeL, rouge1, rouge2, bleu, exact, f1 |
| short answers | exact, f1 |
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import median
from typing import Any

from app.scoring.bootstrap import RESAMPLES, SEED, percentile_interval, resampled_values
from app.scoring.calibration import choice_metrics
from app.scoring.items import Item, Outcome
from app.scoring.labels import accuracy, expected_label, label_in, labels_of, macro_f1
from app.scoring.metric import Metric, mean, share
from app.scoring.texts import bleu, rouge, rouge_reads, token_f1

LONG_WORDS = 5  # an expected text with more words is long
_MAIN = ("choices_accuracy", "accuracy", "every_slot", "rougeL", "bleu", "f1", "exact")


@dataclass(frozen=True, slots=True)
class Measures:
    """The metrics of some outcomes; `main` is the one that decides. `notes`: a line for each left out."""

    metrics: tuple[Metric, ...]
    main: str
    notes: tuple[str, ...] = ()

    @property
    def values(self) -> dict[str, float]:
        """Return each metric's value, between 0 and 1."""
        return {metric.name: metric.value for metric in self.metrics}

    def scores(self, *, resamples: int = RESAMPLES, seed: int = SEED) -> "dict[str, Score]":
        """Return values with intervals: Wilson's for shares, of the bootstrap for all others."""
        others = [metric for metric in self.metrics if not metric.is_share]
        drawn = resampled_values(others, resamples=resamples, seed=seed) if others else []
        intervals = {m.name: percentile_interval(values) for m, values in zip(others, drawn, strict=True)}
        return {
            metric.name: Score(metric, intervals.get(metric.name) or metric.share.interval())
            for metric in self.metrics
        }


@dataclass(frozen=True, slots=True)
class Score:
    """A metric with its 95% interval."""

    metric: Metric
    interval: tuple[float, float]

    def as_json(self) -> dict[str, Any]:
        """Return a share's counts, or a value; its interval; a library's signature."""
        if self.metric.is_share:
            return self.metric.share.as_json()
        found: dict[str, Any] = {
            "value": round(self.metric.value, 4),
            "interval_95": [round(bound, 4) for bound in self.interval],
        }
        return found | ({"signature": self.metric.signature} if self.metric.signature else {})


def measure(outcomes: Sequence[Outcome], choices: Sequence[str] = ()) -> Measures:
    """Measure what makes sense for the items. Raise ValueError where there are none.

    `choices` are the task's labels; one of them is expected wherever an outcome has probabilities. A
    refused request counts as an empty output, which is wrong.
    """
    if not outcomes:
        raise ValueError("there are no outcomes to measure")
    items = [outcome.item for outcome in outcomes]
    metrics, labels = [_exact(outcomes)], labels_of(items, choices)
    metrics += _of_labels(outcomes, labels) if labels else _of_answers(outcomes)
    metrics += _of_slots(outcomes)
    if any(outcome.probabilities for outcome in outcomes):
        metrics += choice_metrics(outcomes, choices)
    if labels:
        return _measures(metrics)
    metrics.append(_f1(outcomes))
    found, notes = _of_long_texts(outcomes) if _are_long(items) else ([], ())
    return _measures([*metrics, *found], notes, is_long=_are_long(items))


def _measures(metrics: Sequence[Metric], notes: Sequence[str] = (), *, is_long: bool = True) -> Measures:
    names = {metric.name for metric in metrics}
    main = next(name for name in _MAIN if name in names and (name != "f1" or is_long))
    return Measures(tuple(metrics), main, tuple(notes))


def _are_long(items: Sequence[Item]) -> bool:
    has_answers = all(item.answer is not None for item in items)
    return not has_answers and median(len(item.expected.split()) for item in items) > LONG_WORDS


def _exact(outcomes: Sequence[Outcome]) -> Metric:
    return share("exact", [(outcome.is_exact, 1) for outcome in outcomes])


def _of_labels(outcomes: Sequence[Outcome], labels: Sequence[str]) -> list[Metric]:
    expected = [expected_label(outcome.item) for outcome in outcomes]
    predicted = [None if outcome.error else label_in(outcome.generated, labels) for outcome in outcomes]
    return [accuracy("accuracy", predicted, expected), macro_f1("macro_f1", predicted, expected, labels)]


def _of_answers(outcomes: Sequence[Outcome]) -> list[Metric]:
    applies = [outcome.item.answer is not None for outcome in outcomes]
    rows = [(each and outcome.is_right, each) for each, outcome in zip(applies, outcomes, strict=True)]
    return [share("accuracy", rows)] if any(applies) else []


def _of_slots(outcomes: Sequence[Outcome]) -> list[Metric]:
    slots = [len(outcome.item.slots or ()) for outcome in outcomes]
    if not any(slots):
        return []
    every = [(num > 0 and o.has_every_slot, num > 0) for num, o in zip(slots, outcomes, strict=True)]
    values = [(o.num_slots_present, num) for num, o in zip(slots, outcomes, strict=True)]
    return [share("every_slot", every), share("slot_values", values)]


def _f1(outcomes: Sequence[Outcome]) -> Metric:
    return mean("f1", [0.0 if o.error else token_f1(o.generated, o.item.expected) for o in outcomes])


def _of_long_texts(outcomes: Sequence[Outcome]) -> tuple[list[Metric], tuple[str, ...]]:
    if not (find_spec("sacrebleu") and find_spec("rouge_score")):
        return [], ("BLEU and ROUGE are left out: they need `pip install 'promptplex[train]'`",)
    texts, expected = [o.generated for o in outcomes], [o.item.expected for o in outcomes]
    if not rouge_reads(expected):
        note = "ROUGE is left out: rouge-score reads the letters a to z and digits only"
        return [bleu(texts, expected)], (note,)
    return [bleu(texts, expected), *rouge(texts, expected)], ()
