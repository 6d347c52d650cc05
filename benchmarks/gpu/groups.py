"""A group of parts, side by side."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.gpu.apart import run_apart
from benchmarks.gpu.parts import Part
from benchmarks.gpu.setup import Setup

_ENOUGH = 5.0  # seconds that a part may take to start


def run_group(group: Sequence[Part], setup: Setup, left: float, log: Path) -> dict[str, dict[str, Any]]:
    """Return what came of each part, by its name; `left` are the seconds that all of them have."""
    if left < _ENOUGH:
        return {part.name: {"found": {}, "seconds": 0.0, "error": "no time was left"} for part in group}

    def run(part: Part) -> dict[str, Any]:
        return run_apart(part.run, setup, min(part.seconds, left), log)

    with ThreadPoolExecutor(min(len(group), max(1, (os.cpu_count() or 1) // 2))) as threads:
        return dict(zip([part.name for part in group], threads.map(run, group), strict=True))
