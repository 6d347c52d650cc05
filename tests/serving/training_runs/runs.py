"""Training runs of a stack, with a process in miniature in place of `promptplex train`."""

import io
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from app.serving.training_runs.data_files import write_data
from app.serving.training_runs.process import ProcessLimits
from app.serving.training_runs.records import RunRecord, new_run_id, now
from app.serving.training_runs.run_files import RunFiles
from app.serving.training_runs.service import TrainingConfig, TrainingRuns
from tests.serving.stack import Stack
from tests.waiting import wait_until

CHILD = Path(__file__).parent / "child.py"
LIMITS = ProcessLimits(threads=1, memory_bytes=2 << 30)


def child_command(plan: dict[str, Any], out: Path) -> list[str]:
    return [sys.executable, "-P", str(CHILD), str(out), json.dumps(plan)]


class Runs(TrainingRuns):
    """`plans` says what the process of a task's run does."""

    def __init__(self, stack: Stack, root: Path) -> None:
        self.plans: dict[str, dict[str, Any]] = {}
        config = TrainingConfig(directory=root, limits=LIMITS)
        super().__init__(stack.publishing, config, self.command)

    def command(self, run: RunFiles) -> Sequence[str]:
        return child_command(self.plans.get(run.record.task_id, {}), run.output)

    def start(self, task_id: str, tenant: str = "", **fields: Any) -> str:
        record = a_record(task_id, tenant=tenant, **fields)
        with self.place(tenant) as place:
            data = io.BytesIO(b'{"text": "a", "label": "b"}\n')
            self.submit(place, record, lambda directory: write_data(directory, {"data": data}))
        return record.id

    def wait(self, task_id: str, run_id: str, *states: str) -> RunRecord:
        """The record as soon as it has one of these states; none: as soon as the run has ended."""

        def found() -> RunRecord | None:
            record = self.directory.record(task_id, run_id)
            return record if (record.state in states if states else record.state.has_ended) else None

        record = wait_until(found)
        assert record is not None
        return record


def a_record(task_id: str, **fields: Any) -> RunRecord:
    given = {"who": "ada", "tenant": "", "settings": {}, "task": {}, "files": {"data": 28}} | fields
    return RunRecord(id=new_run_id(), task_id=task_id, created_at=now(), **given)


@contextmanager
def running_runs(stack: Stack, root: Path) -> Iterator[Runs]:
    runs = Runs(stack, root)
    try:
        yield runs
    finally:
        runs.close()
