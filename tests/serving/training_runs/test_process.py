"""The process of a run: its priority, its bounds, what it doesn't know, and that it is never left behind."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from app.serving.training_runs.process import ProcessLimits, TrainingProcess, environment
from tests.serving.training_runs.runs import LIMITS, child_command
from tests.waiting import wait_until

SECRETS = {
    "PROMPTPLEX_REDIS_URL": "redis://:pass@cache/0",
    "PROMPTPLEX_KEY": "ppx_secret",
    "HF_TOKEN": "hf_secret",
    "AWS_SECRET_ACCESS_KEY": "secret",
}


def started(tmp_path: Path, limits: ProcessLimits = LIMITS, **plan: Any) -> TrainingProcess:
    return TrainingProcess(child_command(plan, tmp_path / "out"), limits, tmp_path / "log")


def ended(process: TrainingProcess) -> TrainingProcess:
    wait_until(lambda: not process.is_running)
    return process


def test_it_has_the_lowest_priority_and_its_own_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    process = ended(started(tmp_path))
    assert process.status == 0, process.tail()
    facts = json.loads((tmp_path / "out/facts.json").read_bytes())
    assert facts["policy"] == os.SCHED_IDLE
    assert (facts["nice"], facts["oom"]) == (19, 1000)
    assert facts["memory"] == LIMITS.memory_bytes
    assert facts["session"] == os.getsid(0), "a session of its own would have an equal share of the cores"
    assert facts["group"] == process.pid, "Ctrl-C is for the server"
    assert facts["environment"]["OMP_NUM_THREADS"] == "1"
    assert not set(SECRETS.values()) & set(facts["environment"].values())


def test_only_what_is_listed_is_passed_on() -> None:
    given = SECRETS | {"PATH": "/bin", "LC_ALL": "C", "HF_HOME": "/hub", "OMP_NUM_THREADS": "64"}
    kept = environment(given, ProcessLimits(threads=3))
    assert not SECRETS.keys() & kept.keys()
    assert (kept["PATH"], kept["LC_ALL"], kept["HF_HOME"]) == ("/bin", "C", "/hub")
    assert (kept["OMP_NUM_THREADS"], kept["HF_HUB_OFFLINE"], kept["CUDA_VISIBLE_DEVICES"]) == ("3", "1", "")
    assert "CUDA_VISIBLE_DEVICES" not in environment({}, ProcessLimits(device="cuda:0"))
    second = {"CUDA_VISIBLE_DEVICES": "1"}  # which is cuda:0 to this server, and must be that to its run
    assert environment(second, ProcessLimits(device="cuda:0"))["CUDA_VISIBLE_DEVICES"] == "1"
    assert environment(second, ProcessLimits())["CUDA_VISIBLE_DEVICES"] == ""


def test_its_last_error_is_its_reason(tmp_path: Path) -> None:
    process = ended(started(tmp_path, error="data.jsonl, line 3: label is empty"))
    assert (process.status, process.error()) == (1, "data.jsonl, line 3: label is empty")


def test_a_traceback_is_no_reason(tmp_path: Path) -> None:
    process = ended(started(tmp_path, raises=True))
    assert (process.status, process.error()) == (1, None)
    assert "RuntimeError" in process.tail()


def test_too_much_memory_is_refused_to_it(tmp_path: Path) -> None:
    process = ended(started(tmp_path, bytes=LIMITS.memory_bytes))
    assert "it ran out of memory; a run may take 2048 MiB" in (process.error() or "")


def test_a_killed_one_ran_out_of_memory(tmp_path: Path) -> None:
    process = started(tmp_path, gate=str(tmp_path / "never"))
    os.kill(process.pid, signal.SIGKILL)
    assert "it ran out of memory" in (ended(process).error() or "")


def test_one_that_ignores_the_signal_is_killed(tmp_path: Path) -> None:
    process = started(tmp_path, gate=str(tmp_path / "never"), is_stubborn=True)
    wait_until((tmp_path / "out/facts.json").exists)
    process.end(grace=0.05)
    assert process.status == -signal.SIGKILL


def test_it_dies_with_its_server(tmp_path: Path) -> None:
    command = child_command({"gate": str(tmp_path / "never"), "is_stubborn": True}, tmp_path / "out")
    code = (
        "import sys; from pathlib import Path\n"
        "from app.serving.training_runs.process import ProcessLimits, TrainingProcess\n"
        "limits = ProcessLimits(threads=1, memory_bytes=2 << 30)\n"
        "print(TrainingProcess(sys.argv[2:], limits, Path(sys.argv[1])).pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "log"), *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with server:
        assert server.stdout is not None
        pid = int(server.stdout.readline())
        wait_until((tmp_path / "out/facts.json").exists)
        server.kill()
    wait_until(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text())
