"""The command line: ``python -m benchmarks.gpu``."""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.options import names

_CANNOT_RUN = 2  # status
_MINUTES, _QUICK_MINUTES = 8.0, 2.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts and print the table; return 0, or 1 where a part failed or something is wrong."""
    options = parse(arguments)
    if options.compile_only:
        return print_resources()
    if options.device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
    elif (reason := _why_no_gpu()) is not None:
        say(reason)
        return _CANNOT_RUN
    report = run(options)
    return 0 if is_right(report) else 1


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the parts one after the other; the report is written after each."""
    from benchmarks.gpu.goals import goals_json
    from benchmarks.gpu.groups import run_group
    from benchmarks.gpu.parts import parts_of
    from benchmarks.gpu.setup import Setup
    from benchmarks.gpu.table import table

    ends = time.monotonic() + 60 * options.minutes
    setup = Setup(device=options.device, is_quick=options.quick, is_tiny=options.device == "cpu")
    options.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"options": {**vars(options), "out": str(options.out)}, "parts": {}}
    for group in parts_of(options.parts, options.shapes, setup):
        left = ends - time.monotonic()
        say(f"{', '.join(part.name for part in group)}: at most {min(group[0].seconds, left):.0f} s")
        report["parts"] |= run_group(group, setup, left, options.out / "log.txt")
        report["goals"] = goals_json(report)
        (options.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    _plot(report, options.out)
    print(table(report))
    return report


def is_right(report: dict[str, Any]) -> bool:
    """Return whether all parts came to their ends, and nothing that was compared differs."""
    if any(part["error"] for part in report["parts"].values()):
        return False
    from benchmarks.gpu.table import wrong_figures

    return not wrong_figures(report)


def print_resources() -> int:
    """Print what the kernels take of a GPU; they are compiled, whatever this process interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "app.models.cuda.resources"]
    return subprocess.run(command, env=environment, check=False).returncode


def say(line: str) -> None:
    """Progress goes to stderr; stdout is for the result."""
    print(line, file=sys.stderr, flush=True)


def _plot(report: dict[str, Any], folder: Path) -> None:
    try:
        from benchmarks.gpu.plots import plot
    except ImportError as error:
        say(f"no plots: {error}")
        return
    for path in plot(report, folder):
        say(f"written: {path}")


def _why_no_gpu() -> str | None:
    """Return what is missing, and what can be done without it."""
    import torch

    if torch.cuda.is_available():
        return None
    built = "this torch has no CUDA" if torch.version.cuda is None else "torch finds no CUDA GPU"
    return (
        f"nothing to measure: {built}. Without one, --compile-only shows what the kernels are compiled to "
        "for an H100 or H200, and --device cpu tries all parts at tiny size in Triton's interpreter"
    )


def _minutes(text: str) -> float:
    minutes = float(text)
    if not 0 < minutes < math.inf:
        raise argparse.ArgumentTypeError(f"a finite number above 0, not {text}")
    return minutes


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the options."""
    from benchmarks.gpu.parts import PARTS, QUICK_PARTS
    from benchmarks.gpu.shapes import SHAPES

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Check and measure the GPU's path on random models, without a network.",
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases, in about two minutes")
    parser.add_argument("--parts", type=names(PARTS), help=f"default {','.join(PARTS)}")
    parser.add_argument(
        "--shapes",
        type=names(list(SHAPES)),
        help="of throughput; default qwen2-0.5b,llama3-8b, on a CPU tiny",
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: all parts at tiny size, interpreted"
    )
    parser.add_argument(
        "--minutes", type=_minutes, help="for all parts together; default 8, or 2 with --quick"
    )
    parser.add_argument(
        "--compile-only", action="store_true", help="compile the kernels for sm_90; needs no GPU"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("build/gpu"), help="directory of report, log and plots"
    )
    options = parser.parse_args(arguments)
    options.parts = options.parts or (QUICK_PARTS if options.quick else PARTS)
    options.shapes = options.shapes or (["tiny"] if options.device == "cpu" else ["qwen2-0.5b", "llama3-8b"])
    options.minutes = options.minutes or (_QUICK_MINUTES if options.quick else _MINUTES)
    return options


if __name__ == "__main__":
    sys.exit(main())
