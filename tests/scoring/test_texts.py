"""BLEU and ROUGE are the libraries' own, and so are BLEU's values of resampled sums."""

import random

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU

from app.scoring.bootstrap import percentile_interval, resampled_values
from app.scoring.metric import mean
from app.scoring.texts import bleu, rouge, token_f1

WORDS = ["the", "a", "cat", "dog", "river", "house", "door", "sits", "runs", "by", "blue,", "old.", "Thai"]


def texts(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(0, 14))) for _ in range(count)]


@pytest.mark.parametrize(
    ("generated", "expected", "value"),
    [
        ("The Eagle!", "eagle", 1.0),
        ("the blue eagle", "an old eagle", 2 / 4),
        ("no no yes", "no yes yes", 4 / 6),
        ("", "", 1.0),
        ("the", "", 1.0),
        ("", "word", 0.0),
    ],
)
def test_token_f1_is_that_of_squad(generated: str, expected: str, value: float) -> None:
    assert token_f1(generated, expected) == pytest.approx(value)


@pytest.mark.parametrize(("count", "seed"), [(1, 1), (1, 2), (1, 3), (2, 4), (3, 5), (40, 6)])
def test_bleu_is_sacrebleus(count: int, seed: int) -> None:
    said, wanted = texts(count, seed), texts(count, seed + 100)
    scorer = BLEU()
    own = bleu(said, wanted)
    assert own.value == pytest.approx(scorer.corpus_score(said, [wanted]).score / 100, abs=1e-12)
    assert str(scorer.get_signature()) in own.signature


def test_bleu_of_resamples_is_that_of_the_resampled_texts() -> None:
    said, wanted = texts(6, 1), texts(6, 2)
    values = []
    for seed in range(20):
        drawn = np.random.default_rng(seed).integers(0, 6, size=(1, 6))[0]
        reference = BLEU().corpus_score([said[i] for i in drawn], [[wanted[i] for i in drawn]])
        values.append(reference.score / 100)
    own = [resampled_values([bleu(said, wanted)], resamples=1, seed=seed)[0][0] for seed in range(20)]
    assert own == pytest.approx(values, abs=1e-12)
    assert len(set(own)) > 10


def test_rouge_is_rouge_scores() -> None:
    said, wanted = texts(20, 3), texts(20, 4)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    found = [scorer.score(target, prediction) for target, prediction in zip(wanted, said, strict=True)]
    for metric in rouge(said, wanted):
        assert metric.value == pytest.approx(np.mean([each[metric.name].fmeasure for each in found]))


def test_the_bootstrap_of_a_mean_is_near_its_normal_interval() -> None:
    values = np.random.default_rng(7).normal(0.5, 0.1, size=400)
    low, high = percentile_interval(resampled_values([mean("any", list(values))])[0])
    spread = 1.96 * values.std() / np.sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - spread, values.mean() + spread), abs=8e-4)


def test_many_examples_are_drawn_in_parts() -> None:
    values = [0.0, 1.0] * 60_000  # more than a part holds, ten times
    drawn = resampled_values([mean("any", values)], resamples=25)[0]
    assert len(drawn) == 25
    assert len(set(drawn)) > 20
    assert drawn == pytest.approx(np.full(25, 0.5), abs=0.01)
