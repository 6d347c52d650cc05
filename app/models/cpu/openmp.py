"""GNU OpenMP, the runtime of torch's products on CPUs."""

import ctypes
import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

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
    if (pause := _function("omp_pause_resource_all")) is not None:
        pause(_SOFT)


@contextmanager
def without_workers() -> Iterator[None]:
    """Let the calling thread, and no other one, run its products alone meanwhile."""
    set_number = _function("omp_set_num_threads")
    if set_number is None:
        yield
        return
    before = torch.get_num_threads()
    set_number(1)
    try:
        yield
    finally:
        set_number(before)


@functools.cache
def _function(name: str) -> Callable[[int], Any] | None:
    """Return a function of the runtime; None where it has none of that name."""
    runtime = loaded_runtime()
    return None if runtime is None else getattr(ctypes.CDLL(runtime), name, None)
