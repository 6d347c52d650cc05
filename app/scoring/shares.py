"""Shares of a whole, with Wilson's interval."""

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Share:
    """`count` of `total`."""

    count: int
    total: int

    @property
    def share(self) -> float:
        """Between 0 and 1."""
        return self.count / self.total

    def interval(self, z: float = 1.96) -> tuple[float, float]:
        """Wilson's score interval (1927); 95% for z = 1.96."""
        centre = self.share + z * z / (2 * self.total)
        variance = self.share * (1 - self.share) / self.total
        spread = z * math.sqrt(variance + z * z / (4 * self.total**2))
        scale = 1 + z * z / self.total
        return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)

    def as_json(self) -> dict[str, Any]:
        """Count, total, share and interval."""
        low, high = self.interval()
        return {
            "count": self.count,
            "total": self.total,
            "share": round(self.share, 4),
            "interval_95": [round(low, 4), round(high, 4)],
        }
