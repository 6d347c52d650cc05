"""GNU OpenMP, the runtime of torch's products on CPUs."""

import ctypes
import re
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
    """
    runtime = loaded_runtime()
    if runtime is None:
        return
    pause = getattr(ctypes.CDLL(runtime), "omp_pause_resource_all", None)  # since OpenMP 5.0
    if pause is not None:
        pause(_SOFT)
