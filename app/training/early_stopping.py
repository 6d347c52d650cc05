"""Which look at the dev set was the best one, and when to stop waiting for a better one."""

from collections.abc import Sequence

from app.training.run import DevRecord


def rank(look: DevRecord) -> tuple[float, float]:
    """Return what a look is compared by: its main score, and the loss where scores are equal.

    At the start of a run many looks have a score of 0; their losses tell which prompt is on its way.
    """
    return main_score(look), -look.loss


def main_score(look: DevRecord) -> float:
    """Return the score that decides, which is the first one; 0 where the loss alone decides."""
    return next(iter(look.scores.values()), 0.0)


def best_look(looks: Sequence[DevRecord]) -> DevRecord:
    """Return the best one, the earlier of equals."""
    return max(looks, key=rank)


def num_stale(looks: Sequence[DevRecord]) -> int:
    """Return how many looks there were since the best one."""
    return len(looks) - 1 - looks.index(best_look(looks)) if looks else 0
