"""`promptplex train`: from a file of examples to a prompt, measured, and ready to go live."""

import inspect
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli.importing import large_imports
from app.cli.training.flags import option_flags, parse_settings, setting_flags
from app.cli.training.options import DATA, OUTPUT, TrainOptions, check_options, data_of_tasks
from app.training.settings import SelfStudySettings, TrainingSettings

_NEEDED = ("matplotlib", "rich")
_RUNS, _SEVERAL = Path("runs"), "multitask"
_INTERRUPTED = 130  # exit status, as shells have it


def train(
    data: Annotated[
        list[Path] | None,
        typer.Argument(
            help="JSONL or CSV with inputs and output, prompt and completion, text and label, or messages; "
            "or a directory with train, dev and test. For --method multitask the NAME=PATH of each task",
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="Task id; several tasks have it before their data", rich_help_panel=DATA),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Directory of the run; default: runs/TASK, of several tasks runs/multitask",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    **given: Any,
) -> None:
    """Train a prompt on the frozen base, measure it on held-out examples, and push it.

    Without further options the data is split, a prefix of 16 tokens is trained, and its accuracy is compared
    with the bare base. The directory of the run has a report.
    """
    _check_extra()
    tasks = data_of_tasks(task, data or ())
    options = TrainOptions(
        data=tasks,
        out=out or _RUNS / (task or _SEVERAL),
        self_study=parse_settings(SelfStudySettings, given),
        **{flag.name: given[flag.name] for flag in option_flags()},
    )
    run_settings = parse_settings(TrainingSettings, given)
    check_options(options, run_settings)
    with large_imports():
        from app.cli.training.running import train_and_tell

    try:
        train_and_tell(options, run_settings)
    except KeyboardInterrupt:
        raise typer.Exit(_INTERRUPTED) from None


def _check_extra() -> None:
    """Raise ValueError where the packages of the extra are missing."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise ValueError(f"training needs {' and '.join(missing)}; run: pip install 'promptplex[train]'")


def register(cli: typer.Typer) -> None:
    """Add the command; its settings' flags are made from the settings."""
    command: Any = train
    own = [each for each in inspect.signature(train).parameters.values() if each.name != "given"]
    parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own]
    parameters += [*option_flags(), *setting_flags()]
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    cli.command("train")(command)
