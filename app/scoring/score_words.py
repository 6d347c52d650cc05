"""Scores as lines for people."""

from app.scoring.measures import Score

_ON_A_HUNDRED = ("bleu", "rouge")  # as their libraries print them, and not in percent
_LOSSES = ("brier", "nll")
_TITLES = {
    "f1": "token F1",
    "macro_f1": "macro F1",
    "bleu": "sacreBLEU",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "choices_macro_f1": "choices macro F1",
    "brier": "Brier score",
    "nll": "NLL",
}


def score_line(score: Score) -> str:
    """Return the name, the counts of a share, the value and its interval."""
    metric = score.metric
    value, low, high = (amount(metric.name, number) for number in (metric.value, *score.interval))
    counts = f"{metric.share.count} of {metric.share.total}" if metric.is_share else ""
    return f"{title(metric.name):<16} {counts:>14}  {value:>7}  [{low}, {high}]  {metric.signature}".rstrip()


def title(name: str) -> str:
    """Return the name of a metric, as people write it."""
    return _TITLES.get(name, name.replace("_", " "))


def amount(name: str, value: float) -> str:
    """Return a share in percent; BLEU and ROUGE out of 100; a loss as it is."""
    if name in _LOSSES:
        return f"{value:.3f}"
    return f"{100 * value:.1f}" if name.startswith(_ON_A_HUNDRED) else f"{value:.1%}"


def signed(name: str, value: float) -> str:
    """Return a difference with its sign: points of 100, or of a loss as it is."""
    return f"{value:+.3f}" if name in _LOSSES else f"{100 * value:+.1f}"
