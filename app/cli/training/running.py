"""A run as its user sees it: what is loaded, how it goes, what came out, and the command that comes next."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import typer

from app.cli.server import NoAnswer, Row
from app.cli.targets import ServerTarget
from app.cli.tasks import print_table
from app.cli.training.interruption import Interruption
from app.cli.training.options import CANDIDATE, REPORT_FILE, TEST_FILE, TrainOptions
from app.cli.training.outcome import table
from app.cli.training.served_base import choose_model, find_served
from app.cli.training.session import is_resumable, open_session, run_directory, run_session
from app.serving.publishing.bundle import read_bundle
from app.store.references import DEFAULT_ALIAS
from app.training.examples import Dataset
from app.training.readers import read_dataset
from app.training.report.contents import Report
from app.training.settings import TrainingSettings


def train_and_tell(options: TrainOptions, settings: TrainingSettings) -> None:
    """Train, print the scores, push if it is wanted, and print what comes next.

    Raise PromptplexError, ValueError, OSError; KeyboardInterrupt, after a line on how to go on.
    """
    say: Callable[[str], None] = _ignore if options.quiet else _say
    interruption = Interruption(_say)
    with interruption.handled():
        report = _trained(options, settings, interruption, say)
    _print_report(report, options.out)
    if options.push:
        _push(options)
    else:
        typer.echo(f"publish it: promptplex push {options.out} --task {options.task} --alias {CANDIDATE}")


def _trained(
    options: TrainOptions, settings: TrainingSettings, interruption: Interruption, say: Callable[[str], None]
) -> Report:
    served = find_served(options)
    model = choose_model(options, served)
    dataset = _read(options) if options.document is None else None
    try:
        with (
            run_directory(options.out),
            open_session(
                options,
                settings,
                dataset,
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


def _read(options: TrainOptions) -> Dataset:
    dataset = read_dataset(
        options.data,
        split_seed=options.split_seed,
        dev_share=options.dev_share,
        test_share=options.test_share,
    )
    for warning in dataset.warnings:
        _say(f"warning: {warning}")
    return dataset


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _ignore(line: str) -> None:
    pass


def _how_to_go_on(out: Path) -> str:
    if is_resumable(out):
        return f"interrupted; the same command with --resume goes on from the last checkpoint in {out}"
    return "interrupted before the first checkpoint; nothing is left of the run"


def _print_report(report: Report, out: Path) -> None:
    method, length = report.settings["method"], report.settings.get("num_virtual_tokens", "as many")
    typer.echo(
        f"{report.task}: {method} of {length} virtual tokens, {report.prompt_bytes:,} bytes, "
        f"step {report.best_step} of {len(report.history.steps)}, {report.seconds:.0f} s"
    )
    print_table(*table(report))
    for note in report.notes:
        typer.echo(note)
    typer.echo(f"report: {out / REPORT_FILE}")


def _push(options: TrainOptions) -> None:
    """Publish what the directory holds. Raise CommandFailed."""
    target = ServerTarget(options.server, options.key)
    bundle = replace(read_bundle(options.out), alias=CANDIDATE)
    try:
        answer = target.push(options.task, bundle)
    except NoAnswer as error:
        raise NoAnswer(
            f"{error.message}. The prompt is in {options.out}: promptplex push {options.out} --task "
            f"{options.task} --alias {CANDIDATE}"
        ) from None
    typer.echo(f"{options.task}@{answer['version']} is {CANDIDATE}")
    typer.echo(f"make it live: {_next_command(options, target.task(options.task), answer['version'])}")


def _next_command(options: TrainOptions, task: Row, version: int) -> str:
    """Return the command that makes a version live: through the gate, where there is one to beat."""
    test = options.out / TEST_FILE
    if DEFAULT_ALIAS in task["aliases"] and test.is_file():
        return (
            f"promptplex compare {options.task}@{CANDIDATE} {options.task}@{DEFAULT_ALIAS} --data {test} "
            "--promote-if better"
        )
    return f"promptplex alias {options.task} {DEFAULT_ALIAS} {version}"
