"""Percentile intervals by the bootstrap: the examples are drawn again, with replacement, thousands of times.

Shapes: resamples R, examples N, statistics of one example S.
"""

from collections.abc import Sequence

import numpy as np

from app.scoring.metric import Array, Metric

RESAMPLES = 10_000
SEED = 0
_CHUNK = 2**20  # draws that are held at a time


def resampled_values(
    metrics: Sequence[Metric], *, resamples: int = RESAMPLES, seed: int = SEED
) -> list[Array]:
    """Return each metric's value in each resample, [R].

    All metrics see the same resamples, so differences between metrics of the same examples are paired.
    """
    stacked = np.hstack([metric.rows for metric in metrics])  # [N, all S]
    rng = np.random.default_rng(seed)
    size = max(1, _CHUNK // len(stacked))
    sums = np.vstack(
        [
            _times_drawn(rng, min(size, resamples - begin), len(stacked)) @ stacked
            for begin in range(0, resamples, size)
        ]
    )  # [R, all S]
    ends = np.cumsum([metric.rows.shape[1] for metric in metrics])[:-1]
    return [metric.of_sums(part) for metric, part in zip(metrics, np.hsplit(sums, ends), strict=True)]


def _times_drawn(rng: np.random.Generator, resamples: int, examples: int) -> Array:
    """Return how often each example is in each resample, [R, N]."""
    drawn = rng.integers(0, examples, size=(resamples, examples))
    drawn += examples * np.arange(resamples)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=resamples * examples)
    return counts.reshape(resamples, examples).astype(np.float64)


def percentile_interval(values: Array) -> tuple[float, float]:
    """Return where the middle 95% of resampled values lie; resamples that say nothing (NaN) don't count."""
    low, high = np.nanquantile(values, (0.025, 0.975))
    return float(low), float(high)
