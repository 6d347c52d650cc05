"""What a run of the command is made of, and how much time is left."""

import time
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """The options that parts look at."""

    device: str = "cuda"
    is_quick: bool = False  # fewer cases, in about two minutes
    is_tiny: bool = False  # sizes with which the interpreter of a CPU takes seconds


@dataclass(frozen=True, slots=True)
class Clock:
    """Seconds of a part; what it has no time for is left out, and the report says so."""

    seconds: float
    began: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds until the limit; negative beyond it."""
        return self.began + self.seconds - time.monotonic()
