"""What the command runs: groups of parts, which run side by side; each has seconds that it may take."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from benchmarks.gpu.apart import Run
from benchmarks.gpu.cases import KINDS, TINY_KINDS
from benchmarks.gpu.exactness import compare_tasks
from benchmarks.gpu.facts import find_facts
from benchmarks.gpu.kernels import compare_kernels, time_kernels
from benchmarks.gpu.sanitizer import sanitize_kernels
from benchmarks.gpu.setup import Setup
from benchmarks.gpu.throughput import measure_throughput
from benchmarks.gpu.tiny import SHAPES as ARCHITECTURES

PARTS = ("facts", "exactness", "kernels", "times", "throughput", "sanitizer")
QUICK_PARTS = ("facts", "exactness", "kernels", "throughput")
# Seconds of each, some ten of which go to imports: together less than eight minutes.
_SECONDS = {"facts": 35, "exactness": 65, "kernels": 50, "times": 30, "sanitizer": 60}
_QUICK_SECONDS = {"facts": 25, "exactness": 35, "kernels": 30, "times": 20, "sanitizer": 40}
_THROUGHPUT = {"llama3-8b": (150, 40)}
_OTHER_THROUGHPUT = (85, 30)
_QUICK_ARCHITECTURES = ("llama", "gemma2", "bart")
_QUICK_KINDS = ("GQA 7 x 64", "window, soft cap", "GQA 4 x 128")


class Part(NamedTuple):
    """A part and its limit."""

    name: str
    run: Run
    seconds: float


def parts_of(names: Sequence[str], shapes: Sequence[str], setup: Setup) -> list[list[Part]]:
    """Return groups of the named parts, in their order. Only what is compared runs side by side."""
    seconds = _QUICK_SECONDS if setup.is_quick else _SECONDS
    known = {
        "facts": [[Part("facts", find_facts, seconds["facts"])]],
        "exactness": [
            [
                Part(f"exactness {each}", partial(compare_tasks, each), seconds["exactness"])
                for each in _architectures(setup)
            ]
        ],
        "kernels": [
            [
                Part(f"kernels {name}", partial(compare_kernels, kinds), seconds["kernels"])
                for name, kinds in _kinds(setup).items()
            ]
        ],
        "times": [[Part("times", time_kernels, seconds["times"])]],
        "throughput": [
            [
                Part(
                    f"throughput {shape}",
                    partial(measure_throughput, shape),
                    _THROUGHPUT.get(shape, _OTHER_THROUGHPUT)[setup.is_quick],
                )
            ]
            for shape in shapes
        ],
        "sanitizer": [[Part("sanitizer", sanitize_kernels, seconds["sanitizer"])]],
    }
    return [group for name in PARTS if name in names for group in known[name]]


def _architectures(setup: Setup) -> Sequence[str]:
    if setup.is_tiny:
        return ("llama",) if setup.is_quick else ("llama", "bart")
    return _QUICK_ARCHITECTURES if setup.is_quick else tuple(ARCHITECTURES)


def _kinds(setup: Setup) -> dict[str, Sequence[str]]:
    """Return kinds of layers by the names of parts: each has kernels of its own to compile."""
    if setup.is_tiny:
        return {"tiny": TINY_KINDS[:2] if setup.is_quick else TINY_KINDS}
    return {kind: (kind,) for kind in (_QUICK_KINDS if setup.is_quick else KINDS)}
