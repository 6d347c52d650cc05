"""Percentiles, where medians and quartiles (spread.py) say too little."""

import statistics
from collections.abc import Sequence


def percentile(values: Sequence[float], percent: int) -> float:
    """Of two values at least; between neighbours it is interpolated."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
