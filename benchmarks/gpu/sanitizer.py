"""NVIDIA's compute-sanitizer over a small program of all kernels: memory that isn't theirs, and races."""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu.findings import Findings
from benchmarks.gpu.setup import Clock, Setup

TOOLS = ("memcheck", "racecheck")
_PROGRAM = ("-m", "benchmarks.gpu.all_kernels")
_PLACES = (Path("/usr/local/cuda/bin"), Path("/usr/local/cuda/compute-sanitizer"))
_SUMMARY = re.compile(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (\d+)")
_REFUSALS = ("Device not supported", "device is not supported")
_FOUND = 86  # status that the tool ends with where it finds anything; a program of Python never has it


def sanitize_kernels(setup: Setup, findings: Findings, clock: Clock) -> None:
    """Note what each tool finds, or why it can't look."""
    program = _sanitizer()
    if program is None or not setup.device.startswith("cuda"):
        findings.note("left out", "there is no GPU" if program else "compute-sanitizer isn't installed here")
        return
    with ThreadPoolExecutor(len(TOOLS)) as threads:
        for tool, found in zip(TOOLS, threads.map(partial(_check, program, clock.left), TOOLS), strict=True):
            findings.note(tool, found)


def _check(program: str, seconds: float, tool: str) -> dict[str, Any]:
    """Run one tool. Torch's cache of memory would hide what lies beyond a tensor, so it is off."""
    command = [program, "--tool", tool, "--error-exitcode", str(_FOUND), sys.executable, *_PROGRAM]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=seconds, env=environment
        )
    except subprocess.TimeoutExpired:
        return {"left out": f"it wasn't done after {seconds:.0f} s"}
    return verdict(run.stdout + run.stderr, run.returncode)


def verdict(output: str, status: int) -> dict[str, Any]:
    """Return the number of errors that a tool's output tells of, or why there is none."""
    print(output)
    if any(refusal in output for refusal in _REFUSALS):
        return {"left out": "compute-sanitizer doesn't support this device, or how it is attached"}
    summary = _SUMMARY.search(output)
    if summary is None:
        last = (output.strip().splitlines() or ["no output"])[-1]
        return {"error": f"it ended with status {status} and no summary: {last[:200]}"}
    if status not in (0, _FOUND):
        return {"error": f"the program ended with status {status}"}
    return {"errors": int(summary[1])}


def _sanitizer() -> str | None:
    places = os.pathsep.join([os.environ.get("PATH", ""), *map(str, _PLACES)])
    return shutil.which("compute-sanitizer", path=places)
