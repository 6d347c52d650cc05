"""SIGKILL at random moments, and just before operations on files: a resumed run is the unbroken run."""

import subprocess
import sys
from pathlib import Path

import pytest


def _kill(root: Path, method: str, *, kills: int, file_kills: int) -> str:
    command = [
        sys.executable,
        "-m",
        "tests.training.killed_runs",
        str(root),
        method,
        str(kills),
        str(file_kills),
    ]
    done = subprocess.run([*command, "15"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    assert "kills between" in _kill(tmp_path, "prompt", kills=3, file_kills=5)


@pytest.mark.soak
@pytest.mark.parametrize("method", ["prompt", "adafactor", "p-tuning", "prefix"])
def test_twenty_kills_change_nothing(tmp_path: Path, method: str) -> None:
    assert "kills between" in _kill(tmp_path, method, kills=20, file_kills=40)
