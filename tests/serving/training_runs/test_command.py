"""The command of a run is one that the command line takes, and means what the client sent."""

import json
import os
from pathlib import Path
from typing import Any

import typer

from app.cli import cli
from app.serving.training_runs.command import train_command
from app.serving.training_runs.run_files import RunDirectory, RunFiles
from app.training.settings import TrainingSettings
from tests.serving.training_runs.runs import a_record

SETTINGS: dict[str, Any] = {
    "method": "p-tuning",
    "init_text": "--help",
    "instruction": "-x\n'$(true)'",
    "network": "mlp",
    "sites": ["dec.self", "enc.self"],
    "steps": 7,
    "learning_rate": 1e-3,
    "split_seed": 3,
    "dev_share": 0.25,
    "publish": False,
}


def a_run(root: Path, **fields: Any) -> RunFiles:
    return RunDirectory(root).create(
        a_record("sentiment", **fields), lambda folder: (folder / "data.csv").touch()
    )


def test_the_command_line_takes_it(tmp_path: Path) -> None:
    run = a_run(tmp_path, settings=SETTINGS, task={"template": "{text}"}, init_from="other@3")
    server = {"model": "base", "store": tmp_path, "max_context": 64, "generation_config": "none"}
    command = train_command(server | {"device": "cpu"})(run)
    assert command[1:5] == ["-P", "-m", "app.cli", "train"]
    parser = typer.main.get_command(cli).commands["train"]  # type: ignore[attr-defined]
    given = parser.make_context("train", list(command[5:])).params
    for name, value in SETTINGS.items():
        if name not in ("publish", "sites"):
            assert given[name] == value, name
    assert [str(site) for site in given["sites"]] == SETTINGS["sites"]
    assert given["init_from"] == "other@3"
    assert (given["model"], given["device"], given["quiet"], given["push"]) == ("base", "cpu", True, False)
    assert {name: given[name] for name in server} == server
    assert given["data"] == [run.data / "data.csv"]
    assert json.loads(given["task_file"].read_text()) == {"template": "{text}"}
    assert not (TrainingSettings.model_fields.keys() - given.keys()), "a setting without a flag"
    os.close(run._lock)
