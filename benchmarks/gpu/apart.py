"""Parts in processes of their own: one that fails, hangs or spoils its GPU context harms no other."""

import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.findings import Findings, read_findings
from benchmarks.gpu.setup import Clock, Setup

Run = Callable[[Setup, Findings, Clock], None]

_GRACE = 10.0  # seconds that a part gets after its limit, since it may look at its clock late


def run_apart(run: Run, setup: Setup, seconds: float, log: Path, *, grace: float = _GRACE) -> dict[str, Any]:
    """Run a part, whose output goes to `log`; return what it found, its seconds, and why it ended early."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        context = multiprocessing.get_context("spawn")
        began = time.monotonic()
        clock = Clock(seconds, began)  # the imports of the process count too
        process = context.Process(target=_work, args=(run, setup, clock, path, log))
        process.start()
        process.join(seconds + grace)
        is_late = process.is_alive()
        if is_late:
            with suppress(ProcessLookupError):  # it may hang before it has a group
                os.killpg(process.pid or 0, signal.SIGKILL)  # with what it has started itself
            process.kill()
            process.join()
        found = read_findings(path)
        error = found.pop("error", None)
        if error is None and (is_late or process.exitcode):
            error = f"stopped after {seconds:.0f} s" if is_late else f"ended with status {process.exitcode}"
    return {"found": found, "seconds": round(time.monotonic() - began, 1), "error": error}


def run_here(run: Run, setup: Setup, clock: Clock, path: Path) -> dict[str, Any]:
    """Run a part in this process."""
    findings = Findings(path)
    try:
        run(setup, findings, clock)
    except Exception as error:
        traceback.print_exc()
        findings.note("error", in_one_line(error))
    found = read_findings(path)
    return {
        "error": found.pop("error", None),
        "found": found,
        "seconds": round(clock.seconds - clock.left, 1),
    }


def in_one_line(error: BaseException) -> str:
    """Return an exception's kind and the first line of its message."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}".removesuffix(": ")


def noted(error: Exception) -> str:
    """Print an exception's traceback and return it in one line, for a part that goes on.

    Raise what the GPU raises where its context is spoiled: whatever follows would fail too.
    """
    traceback.print_exception(error)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    return in_one_line(error)


def _work(run: Run, setup: Setup, clock: Clock, path: Path, log: Path) -> None:
    os.setsid()
    with log.open("a") as output:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(output.fileno(), stream.fileno())
    outcome = run_here(run, setup, clock, path)
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads and graphs of a part that failed might hold up the end.
    os._exit(0 if outcome["error"] is None else 1)
