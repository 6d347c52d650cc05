"""Parts of benchmarks.gpu for tests: one fails, one is spoilt by a hang."""

import time

from benchmarks.gpu.findings import Findings
from benchmarks.gpu.setup import Clock, Setup


def fails(setup: Setup, findings: Findings, clock: Clock) -> None:
    findings.note("device", setup.device)
    raise ValueError("no such kernel\nmore")


def hangs(setup: Setup, findings: Findings, clock: Clock) -> None:
    findings.note("begun", True)
    time.sleep(600)
