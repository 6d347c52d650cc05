"""A run as its user sees it: what is loaded, how it goes, what came out, and the command that comes next."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import typer

from app.cli.server import NoAnswer, Row
from app.cli.targets import ServerTarget
from app.cli.tasks import print_table
from app.cli.training.directory import is_resumable, run_directory
from app.cli.training.interruption import Interruption
from app.cli.training.options import CANDIDATE, REPORT_FILE, TEST_FILE, TrainOptions
from app.cli.training.outcome import table
from app.cli.training.results import run_session
from app.cli.training.served_base import choose_model, find_served
from app.cli.training.session import open_session
from app.serving.publishing.bundle import read_bundle
from app.store.references import DEFAULT_ALIAS
from app.training.examples import Dataset
from app.training.readers import read_tasks
from app.training.report.contents import Report
from app.training.settings import TrainingSettings


def train_and_tell(options: TrainOptions, settings: TrainingSettings) -> None:
    """Train, print the scores, push if it is wanted, and print what comes next.

    Raise PromptplexError, ValueError, OSError; KeyboardInterrupt, after a line on how to go on.
    """
    say: Callable[[str], None] = _ignore if options.quiet else _say
    interruption = Interruption(_say)
    with interruption.handled():
        reports = _trained(options, settings, interruption, say)
    for report in reports:
        _print_scores(report)
    typer.echo(f"report: {options.out / REPORT_FILE}")
    for task in options.data:
        if options.push:
            _push(options, task)
        else:
            typer.echo(f"publish it: {_push_command(options, task)}")


def _trained(
    options: TrainOptions, settings: TrainingSettings, interruption: Interruption, say: Callable[[str], None]
) -> list[Report]:
    served = find_served(options)
    model = choose_model(options, served)
    datasets = _read(options) if options.document is None else {}
    try:
        with (
            run_directory(options.out),
            open_session(
                options,
                settings,
                datasets,
                model=model,
                served=served,
                interruption=interruption,
                say=say,
            ) as session,
        ):
            return run_session(session)
    except KeyboardInterrupt:
        _say(_how_to_go_on(options.out))
        raise


def _read(options: TrainOptions) -> dict[str, Dataset]:
    datasets = read_tasks(
        options.data,
        split_seed=options.split_seed,
        dev_share=options.dev_share,
        test_share=options.test_share,
    )
    for name, dataset in datasets.items():
        of_task = "" if len(datasets) == 1 else f"{name}: "
        for warning in dataset.warnings:
            _say(f"{of_task}warning: {warning}")
    return datasets


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _ignore(line: str) -> None:
    pass


def _how_to_go_on(out: Path) -> str:
    if is_resumable(out):
        return f"interrupted; the same command with --resume goes on from the last checkpoint in {out}"
    return "interrupted before the first checkpoint; nothing is left of the run"


def _print_scores(report: Report) -> None:
    method, length = report.settings["method"], report.settings.get("num_virtual_tokens", "as many")
    typer.echo(
        f"{report.task}: {method} of {length} virtual tokens, {report.prompt_bytes:,} bytes, "
        f"step {report.best_step} of {len(report.history.steps)}, {report.seconds:.0f} s"
    )
    print_table(*table(report))
    for note in report.notes:
        typer.echo(note)


def _push(options: TrainOptions, task: str) -> None:
    """Publish a task's result. Raise CommandFailed."""
    target = ServerTarget(options.server, options.key)
    bundle = replace(read_bundle(options.out / options.folder(task)), alias=CANDIDATE)
    try:
        answer = target.push(task, bundle)
    except NoAnswer as error:
        raise NoAnswer(
            f"{error.message}. The prompt is in {options.out}: {_push_command(options, task)}"
        ) from None
    test = options.out / options.folder(task) / TEST_FILE
    typer.echo(f"{task}@{answer['version']} is {CANDIDATE}")
    typer.echo(f"make it live: {_next_command(target.task(task), task, test, answer['version'])}")


def _push_command(options: TrainOptions, task: str) -> str:
    return f"promptplex push {options.out / options.folder(task)} --task {task} --alias {CANDIDATE}"


def _next_command(row: Row, task: str, test: Path, version: int) -> str:
    """Return the command that makes a version live: through the gate, where lines were held out for it."""
    if not test.is_file():
        return f"promptplex alias {task} {DEFAULT_ALIAS} {version}"
    against = f"{task}@{DEFAULT_ALIAS}" if DEFAULT_ALIAS in row["aliases"] else "--against base"
    return f"promptplex compare {task}@{CANDIDATE} {against} --data {test} --promote-if better"
