"""Parts of benchmarks.gpu that end badly, for tests: they run in processes of their own."""

import os
import signal
import time

from benchmarks.gpu.findings import Findings
from benchmarks.gpu.setup import Clock, Setup


def fails(setup: Setup, findings: Findings, clock: Clock) -> None:
    findings.note("device", setup.device)
    raise ValueError("no such kernel\nmore")


def dies(setup: Setup, findings: Findings, clock: Clock) -> None:
    findings.note("begun", True)
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(setup: Setup, findings: Findings, clock: Clock) -> None:
    time.sleep(600)
