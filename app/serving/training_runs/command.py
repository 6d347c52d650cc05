"""What a run's process executes: the command that a user would type."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from app.serving.training_runs.data_files import data_paths
from app.serving.training_runs.run_files import RunFiles
from app.serving.training_runs.run_settings import parse_run_settings
from app.serving.training_runs.service import Command

_TASK = "task.json"


def train_command(base: Mapping[str, Any]) -> Command:
    """Return what makes the command of a run; `base`: flags that say what is served, and how, by name."""

    def command(run: RunFiles) -> Sequence[str]:
        task_file = run.path / _TASK
        task_file.write_text(json.dumps(run.record.task))
        outputs = {"task": run.record.task_id, "task_file": task_file, "out": run.output}
        settings = parse_run_settings(run.record.settings).for_command()
        return [
            *(sys.executable, "-P", "-m", "app.cli", "train", "--quiet"),
            *_flags({**base, **outputs, **settings, "init_from": run.record.init_from}),
            *map(str, data_paths(run.data)),
        ]

    return command


def _flags(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield a flag for each value but None; with `=`, so that a value is none, whatever it begins with."""
    for name, value in values.items():
        for each in value if isinstance(value, list) else [value]:
            if each is not None:
                yield f"--{name.replace('_', '-')}={each}"
