"""Wilson's interval, against values from elsewhere."""

import pytest

from app.scoring.shares import Share


def test_wilson_intervals() -> None:
    # From scipy 1.17: binomtest(count, 30).proportion_ci(method="wilson").
    for count, low, high in ((0, 0.0, 0.1135), (28, 0.7868, 0.9815), (30, 0.8865, 1.0)):
        assert Share(count, 30).interval() == pytest.approx((low, high), abs=2e-4)
