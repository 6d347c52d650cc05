"""Scores as lines for people."""

from app.scoring.measures import Score

_ON_A_HUNDRED = ("bleu", "rouge")  # as their libraries print them, and not in percent


def score_line(score: Score) -> str:
    """Return the name, the counts of a share, the value and its interval."""
    metric = score.metric
    value, low, high = (amount(metric.name, number) for number in (metric.value, *score.interval))
    counts = f"{metric.share.count} of {metric.share.total}" if metric.is_share else ""
    return f"{title(score):<16} {counts:>14}  {value:>7}  [{low}, {high}]"


def title(score: Score) -> str:
    """Return the name of a metric, as people write it."""
    name = score.metric.name
    return {"bleu": "sacreBLEU", "f1": "token F1"}.get(name, name.replace("_", " "))


def amount(name: str, value: float) -> str:
    """Return a share in percent; BLEU and ROUGE out of 100."""
    return f"{100 * value:.1f}" if name.startswith(_ON_A_HUNDRED) else f"{value:.1%}"
