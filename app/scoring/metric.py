"""A metric as sums over examples, which a bootstrap can draw again.

Shapes: examples N, statistics of one example S.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from app.scoring.shares import Share

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One metric of N examples; its value is a function of the sums of their statistics."""

    name: str
    rows: Array  # [N, S]
    of_sums: Callable[[Array], Array]  # [..., S] -> [...]; NaN where the sums say nothing
    is_share: bool = False  # S = 2: how many of how many
    is_loss: bool = False  # lower is better; not bounded by 1
    signature: str = ""  # of a library's metric: its version and settings

    @property
    def value(self) -> float:
        """Between 0 and 1, except for a loss."""
        return float(self.of_sums(self.rows.sum(axis=0)))

    @property
    def share(self) -> Share:
        """Return the counts of a share."""
        assert self.is_share
        count, total = self.rows.sum(axis=0)
        return Share(int(count), int(total))


def ratio(sums: Array) -> Array:
    """Return the first of two sums over the second."""
    hits, total = sums[..., 0], sums[..., 1]
    return np.divide(hits, total, out=np.full_like(hits, np.nan), where=total > 0)


def share(name: str, hits: Sequence[tuple[int, int]]) -> Metric:
    """Count hits; each example has `(hits, total)`, and (0, 0) where the metric doesn't apply to it."""
    return Metric(name=name, rows=np.array(hits, dtype=np.float64), of_sums=ratio, is_share=True)


def mean(name: str, values: Sequence[float | None], signature: str = "", *, is_loss: bool = False) -> Metric:
    """Average a value of each example; None where the metric doesn't apply."""
    rows = np.array([(0, 0) if value is None else (value, 1) for value in values], dtype=np.float64)
    return Metric(name=name, rows=rows, of_sums=ratio, signature=signature, is_loss=is_loss)
