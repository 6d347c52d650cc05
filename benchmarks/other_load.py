"""Which share of this machine's CPUs other processes took, while something was measured."""

import os
import time
from contextlib import suppress

import psutil


class OtherLoad:
    """Watches a block. This process and its children are ours; work of those that end within it is not."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self.share = 0.0  # of all CPUs, from 0 to 1

    def __enter__(self) -> "OtherLoad":
        self._began, self._before = time.monotonic(), self._others()
        return self

    def __exit__(self, *_: object) -> None:
        capacity = (time.monotonic() - self._began) * (os.cpu_count() or 1)
        self.share = max(0.0, self._others() - self._before) / capacity

    def _others(self) -> float:
        """CPU seconds of everybody else since the machine started, and what its host took away."""
        everybody = psutil.cpu_times()
        ours = []
        for each in (self._process, *self._process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):  # it has just ended
                ours.append(each.cpu_times())
        busy = sum(everybody) - everybody.idle - getattr(everybody, "iowait", 0.0)
        busy -= getattr(everybody, "guest", 0.0) + getattr(
            everybody, "guest_nice", 0.0
        )  # in user and nice too
        return float(busy - sum(own.user + own.system for own in ours))
