"""SIGKILL at every step of publishing: what was acknowledged stays, nothing is torn, it goes on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


def kill_writers(root: Path, kills: int, writers: int) -> dict[str, int]:
    script = [sys.executable, "-m", "tests.store.crash_writers", str(root), str(kills), str(writers), "7"]
    repository = Path(__file__).parents[2]
    done = subprocess.run(script, cwd=repository, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stderr
    report: dict[str, int] = json.loads(done.stdout)
    return report


@pytest.mark.parametrize("writers", [1, 2])
def test_a_killed_writer_loses_nothing(writers: int, tmp_path: Path) -> None:
    assert kill_writers(tmp_path, 50, writers)["kills"] >= 50


@pytest.mark.soak
@pytest.mark.parametrize("writers", [1, 2])
def test_a_thousand_kills(writers: int, tmp_path: Path) -> None:
    report = kill_writers(tmp_path, 1000, writers)
    assert report["kills"] >= 1000
    assert report["points_struck"] >= report["points"]
