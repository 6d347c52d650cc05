"""`promptplex eval`: a held-out file through a running server, and how much of it was right."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli.asking import (
    NO_CHOICE,
    Asked,
    Version,
    ask_all,
    base_asked,
    check_directory,
    expected_choices,
    find_version,
    is_chat,
    read_items,
    sha256_of,
)
from app.cli.server import DEFAULT_SERVER, KeyOption, ServerClient, ServerOption
from app.scoring.calibration import Calibration
from app.scoring.items import Item, Outcome
from app.scoring.measures import Measures, Score, measure
from app.scoring.pictures import check_picture
from app.scoring.reliability import errors_in_words, reliability_lines, save_reliability
from app.scoring.score_words import score_line
from app.scoring.self_consistency import Point, curve_lines, save_curve, self_consistency
from app.scoring.temperature import TemperatureFit, fit_temperature
from app.serving.program_settings import MAX_BALLOTS
from app.serving.publishing.task_settings import LabelledChoice
from app.text.template import Template, parse_template

MaxNewTokensOption = Annotated[
    int | None, typer.Option(help="Maximum number of new tokens in an answer; default: the task's", min=1)
]
LimitOption = Annotated[int | None, typer.Option(help="Number of lines to use; default: all", min=1)]
ConcurrencyOption = Annotated[int, typer.Option(help="Number of concurrent requests", min=1, max=256)]
VoteOption = Annotated[
    int | None,
    typer.Option(
        help="Number of answers to sample for each line; the most frequent one counts", min=1, max=MAX_BALLOTS
    ),
]
FitOption = Annotated[
    bool,
    typer.Option(
        "--fit-calibration", help="Fit the temperature that calibrates the probabilities of a task's choices"
    ),
]
PlotOption = Annotated[
    Path | None,
    typer.Option(help="Picture to write, .svg or .png: accuracy over ballots, or the reliability diagram"),
]


def evaluate(
    data: Annotated[Path, typer.Option(help="File of inputs and expected outputs: .jsonl, .csv or .tsv")],
    task: Annotated[str | None, typer.Option(help="Task, or task@version; default: the base model")] = None,
    template: Annotated[
        str | None, typer.Option(help="Template for the inputs, such as 'Review: {text}'")
    ] = None,
    max_new_tokens: MaxNewTokensOption = None,
    limit: LimitOption = None,
    concurrency: ConcurrencyOption = 16,
    vote: VoteOption = None,
    fit_calibration: FitOption = False,
    plot: PlotOption = None,
    out: Annotated[Path | None, typer.Option(help="File to write scores and outputs to, as JSON")] = None,
    server: ServerOption = DEFAULT_SERVER,
    key: KeyOption = None,
) -> None:
    """Evaluate a task on a held-out file: the metrics that suit its answers, and calibration of choices."""
    check_directory(out, plot)
    items = read_items(data, limit)
    _check_flags(items, template, vote, plot)
    parameters = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    with ServerClient(server, key) as client:
        version = None if task is None else find_version(client, task, or_ensemble=True)
        asked = _asked(client, version, data, parameters, _template(template), is_fitted=fit_calibration)
        asked = replace(asked, num_ballots=vote)
        is_needed = fit_calibration or (plot is not None and not asked.is_voted)
        asked = replace(asked, choices=_choices(version, items, is_needed=is_needed))
        began = time.monotonic()
        (outcomes,) = ask_all(client, [asked], items, concurrency, "eval")
    seconds = time.monotonic() - began
    fit = fit_temperature(outcomes, version.temperature) if fit_calibration and version is not None else None
    evaluation = _Evaluation(asked, data, outcomes, measure(outcomes, asked.labels), seconds, fit)
    if out is not None:
        report = evaluation.as_json() | {"template": template}
        out.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    evaluation.show(plot)
    if any(outcome.error for outcome in outcomes):
        raise typer.Exit(1)


def _check_flags(items: Sequence[Item], template: str | None, vote: int | None, plot: Path | None) -> None:
    if template is not None and is_chat(items):
        raise ValueError("--template goes with inputs; messages have the base's chat template")
    if vote is not None and is_chat(items):
        raise ValueError("--vote goes with inputs; messages are answered once")
    if plot is not None:
        check_picture(plot)


def _template(source: str | None) -> Template | None:
    if source is not None and "{text}" not in source:
        raise ValueError("--template must hold {text}, where the input goes")
    return None if source is None else parse_template(source)


def _asked(
    client: ServerClient,
    version: Version | None,
    data: Path,
    parameters: dict[str, Any],
    template: Template | None,
    *,
    is_fitted: bool,
) -> Asked:
    if version is None:
        return base_asked(client, parameters, template)
    if version.is_ensemble and is_fitted:
        raise ValueError("the versions of an ensemble are calibrated one by one; name one, as task@3")
    if version.was_trained_on(data):
        name = f"version {version.number} of {version.task_id}"
        if is_fitted:
            raise ValueError(f"{name} was trained on {data}; fit its calibration on held-out lines")
        typer.echo(f"warning: {name} was trained on {data}, so these scores are too good", err=True)
    return version.asked(parameters, template)


def _choices(
    version: Version | None, items: Sequence[Item], *, is_needed: bool
) -> tuple[LabelledChoice, ...]:
    """Return the choices that the items expect. Raise ValueError where they are needed."""
    choices = () if version is None else expected_choices(version.choices, items)
    if is_needed and (version is None or not version.choices):
        raise ValueError(
            "--plot and --fit-calibration need probabilities of a task's choices, and here there are none"
        )
    if version is not None and version.choices and not choices:
        if is_needed:
            raise ValueError(NO_CHOICE)
        typer.echo(NO_CHOICE, err=True)
    return choices


@dataclass(frozen=True)
class _Evaluation:
    """What came of all items, and what it is worth."""

    asked: Asked
    data: Path
    outcomes: Sequence[Outcome]
    measures: Measures
    seconds: float
    fit: TemperatureFit | None

    @cached_property
    def scores(self) -> dict[str, Score]:
        return self.measures.scores()

    @cached_property
    def calibration(self) -> Calibration | None:
        has_any = any(outcome.probabilities for outcome in self.outcomes)
        return Calibration.of(self.outcomes) if has_any else None

    def as_json(self) -> dict[str, Any]:
        report = {
            "task": self.asked.name,
            "version_digest": self.asked.digest,
            "data": self.data.name,
            "data_sha256": sha256_of(self.data),
            "scores": {name: score.as_json() for name, score in self.scores.items()},
            "errors": sum(outcome.error is not None for outcome in self.outcomes),
            "seconds": round(self.seconds, 2),
            "outputs": [_output(outcome) for outcome in self.outcomes],
        }
        if self.calibration is not None:
            report["calibration"] = self.calibration.as_json()
        if self.curve:
            report["self_consistency"] = [point.as_json() for point in self.curve]
        if self.fit is not None:
            report["fitted"] = self.fit.as_json()
        return report

    @cached_property
    def curve(self) -> list[Point]:
        return self_consistency(self.outcomes) if any(outcome.ballots for outcome in self.outcomes) else []

    def show(self, plot: Path | None) -> None:
        typer.echo(f"{self.asked.name} on {self.data}: {len(self.outcomes)} inputs")
        for score in self.scores.values():
            typer.echo(score_line(score))
        calibration = self.calibration
        if calibration is not None:
            typer.echo(errors_in_words(calibration))
            typer.echo("\n".join(reliability_lines(calibration)))
        if self.curve:
            typer.echo("\n".join(curve_lines(self.curve)))
        if self.fit is not None:
            self._show_fit(self.fit)
        if plot is not None:
            self._draw(plot)
        for note in self.measures.notes:
            typer.echo(note, err=True)
        failed = [outcome for outcome in self.outcomes if outcome.error]
        if failed:
            typer.echo(
                f"{len(failed)} requests were refused and count as wrong; the first: {failed[0].error}",
                err=True,
            )

    def _show_fit(self, fit: TemperatureFit) -> None:
        typer.echo(f"temperature {fit.temperature:g}, fitted on {fit.num_lines} lines of {self.data}")
        typer.echo(
            f"  before: {fit.before}\n  after:  {fit.after} (each half at the other half's temperature)"
        )
        if fit.is_at_bound:
            typer.echo(
                "  this is the bound of what is tried, so the lines say too little: "
                "take more, and harder ones, before you push it",
                err=True,
            )
        task_id = self.asked.name.partition("@")[0]
        typer.echo(
            f"  push the version's files again with it: promptplex push {task_id} ... "
            f"--calibration-temperature {fit.temperature:g}"
        )

    def _draw(self, path: Path) -> None:
        title = f"{self.asked.name} on {self.data.name}"
        if self.curve:
            save_curve(self.curve, path, title)
        elif self.calibration is not None:
            save_reliability(self.calibration, path, title)


def _output(outcome: Outcome) -> dict[str, Any]:
    line: dict[str, Any] = {
        "inputs": outcome.item.inputs,
        "expected": outcome.item.expected,
        "generated": outcome.generated,
        "exact": outcome.is_exact,
    }
    if outcome.probabilities is not None:
        line["probabilities"] = outcome.probabilities
    if outcome.ballots:
        line["ballots"] = [*outcome.ballots]
    return line if outcome.error is None else line | {"error": outcome.error}


def register(cli: typer.Typer) -> None:
    """Add the command."""
    cli.command("eval")(evaluate)
