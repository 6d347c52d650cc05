"""GNU OpenMP, the runtime of torch's products on CPUs."""

import ctypes
import functools
import re
from collections.abc import Callable
from pathlib import Path

_SOFT = 1  # omp_pause_soft: give resources back, keep settings


def loaded_runtime() -> str | None:
    """Return the path of the GNU OpenMP runtime that torch brought into this process; None if it didn't."""
    try:
        mapped = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    found = re.search(r"(/\S*libgomp\S*)$", mapped, re.MULTILINE)
    return found[1] if found else None


def release_workers() -> None:
    """End the calling thread's OpenMP workers; they come back when it needs them again.

    Each thread that ever ran a product keeps workers of its own. As soon as there are more of them than
    cores, all workers go to sleep after every parallel region instead of waiting for the next one, and
    waking them costs 50 to 80 microseconds: a tenth of a decode step. So a thread that has loaded a
    model gives its workers back before the engine's thread starts to work.

    Workers that wait for the next product keep their cores busy, for 300,000 looks (8 to 15 ms), then sleep.
    Fewer looks would cost a small base a fifth of its throughput, since workers sleep between products then.
    So the engine's thread gives its workers back when there is nothing to do; a new one takes 0.1 ms.
    """
    if (pause := _pause()) is not None:
        pause(_SOFT)


@functools.cache
def _pause() -> Callable[[int], int] | None:
    """Return what ends the calling thread's workers; None where the runtime has no such function."""
    runtime = loaded_runtime()
    return None if runtime is None else getattr(ctypes.CDLL(runtime), "omp_pause_resource_all", None)
