"""Metrics of texts: token F1 as SQuAD has it, BLEU by sacrebleu, ROUGE by rouge-score."""

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

from app.scoring.metric import Array, Metric, mean

ROUGE = ("rouge1", "rouge2", "rougeL")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ORDER = 4  # of BLEU's n-grams


def squad_tokens(text: str) -> list[str]:
    """Return lower-case words without punctuation and articles (SQuAD's `normalize_answer`)."""
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def token_f1(generated: str, expected: str) -> float:
    """Return the F1 of the words that both texts have, 1 for two empty texts (Rajpurkar et al., 2018)."""
    said, wanted = squad_tokens(generated), squad_tokens(expected)
    if not said or not wanted:
        return float(said == wanted)
    common = (Counter(said) & Counter(wanted)).total()
    return 2 * common / (len(said) + len(wanted))


def bleu(generated: Sequence[str], expected: Sequence[str]) -> Metric:
    """Return corpus BLEU with sacrebleu's own settings, between 0 and 1."""
    from sacrebleu.metrics.bleu import BLEU

    corpus, sentence = BLEU(), BLEU(effective_order=True)  # of a sentence only the counts are used
    corpus.corpus_score(generated, [expected])
    rows = []
    for text, reference in zip(generated, expected, strict=True):
        found = sentence.sentence_score(text, [reference])
        rows.append([found.sys_len, found.ref_len, *found.counts, *found.totals])
    return Metric(
        name="bleu",
        rows=np.array(rows, dtype=np.float64),
        of_sums=_bleu_of_sums,
        signature=f"sacreBLEU {corpus.get_signature()}",
    )


def _bleu_of_sums(sums: Array) -> Array:
    """Return what `BLEU.compute_bleu` does with exponential smoothing, for many sums at once."""
    length, reference = sums[..., 0], sums[..., 1]
    correct, total = sums[..., 2 : 2 + _ORDER], sums[..., 2 + _ORDER :]
    halvings = np.cumsum(correct == 0, axis=-1)  # each order without a match counts half of the one before
    matched = np.where(correct == 0, 0.5**halvings, correct)
    precisions = np.divide(matched, total, out=np.ones_like(total), where=total > 0)
    penalty = np.exp(np.minimum(0, 1 - reference / np.maximum(length, 1)))
    score = penalty * np.exp(np.log(precisions).mean(axis=-1))
    means_something = (total > 0).all(axis=-1) & (correct > 0).any(axis=-1)
    return np.where(means_something, score, 0.0)


def rouge(generated: Sequence[str], expected: Sequence[str]) -> list[Metric]:
    """Return the mean F of ROUGE-1, ROUGE-2 and ROUGE-L, with Porter's stemmer as papers have it."""
    from importlib.metadata import version

    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    found = [scorer.score(reference, text) for text, reference in zip(generated, expected, strict=True)]
    signature = f"rouge-score {version('rouge-score')}, stemmer, F"
    return [mean(name, [each[name].fmeasure for each in found], signature) for name in ROUGE]


def rouge_reads(texts: Sequence[str]) -> bool:
    """Return whether all texts have words for rouge-score, which knows the letters a to z and digits only."""
    return all(re.search("[a-z0-9]", text.lower()) for text in texts)
