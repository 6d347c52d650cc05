"""A training process in miniature: `child.py OUT PLAN` writes a run's files, and ends as the plan says."""

import gc
import json
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

TASK = {
    "template": "{text}\n",
    "metrics": {"exact": 0.75},
    "training": {
        "method": "prefix",
        "steps": 4,
        "curves": {"loss": {"steps": [1, 4], "values": [1.0, 0.25]}},
    },
}
SCORE = {"count": 6, "total": 8, "share": 0.75, "interval_95": [0.4, 0.93]}
METRICS = {"main_metric": "exact", "test": {"trained prompt": {"exact": SCORE}}, "seconds": 2}


def main(out: Path, plan: dict[str, Any]) -> None:
    if plan.get("is_stubborn"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    out.mkdir()
    (out / "facts.json").write_text(json.dumps(facts()))
    if plan.get("reports"):
        report(out)
    if "gate" in plan:
        wait_for(Path(plan["gate"]))
    if "bytes" in plan:
        bytearray(plan["bytes"])
    if "error" in plan:
        sys.exit(f"error: {plan['error']}")
    if plan.get("raises"):
        raise RuntimeError(str(out))
    if "prompt" in plan:
        shutil.copy(plan["prompt"], out / "prompt.safetensors")
        (out / "task.json").write_text(json.dumps(TASK))


def report(out: Path) -> None:
    """What a run writes, by the code that writes it; the import takes most of the process's time."""
    gc.disable()  # a quarter of that time
    from app.training.run import DevRecord, History, StepRecord
    from app.training.run_directory import RunDirectory, RunState, RunStatus

    status = RunStatus(
        task="made", settings={"steps": 4}, data_digest="0" * 64, base="tiny", base_fingerprint="1" * 64
    )
    run = RunDirectory(out, status)
    run.on_start(History())
    for step in range(1, 5):
        record = StepRecord(
            step=step, loss=1 / step, learning_rate=0.1, grad_norm=1.0, num_tokens=50, seconds=0.5
        )
        run.on_step(record)
    run.on_dev(DevRecord(step=4, loss=0.5, scores={"exact": 0.75}, is_best=True, seconds=0.1))
    run.on_advice("the loss still falls: try more steps")
    run.write("metrics.json", json.dumps(METRICS).encode())
    run.end(RunState.DONE)


def facts() -> dict[str, Any]:
    return {
        "policy": os.sched_getscheduler(0),
        "nice": os.nice(0),
        "session": os.getsid(0),
        "group": os.getpgid(0),
        "memory": resource.getrlimit(resource.RLIMIT_DATA)[0],
        "oom": int(Path("/proc/self/oom_score_adj").read_text()),
        "environment": dict(os.environ),
    }


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
