"""`promptplex compare`: two sides on the same held-out file, and the gate to `live`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli.asking import (
    Asked,
    Version,
    ask_all,
    base_asked,
    check_directory,
    expected_choices,
    find_version,
    is_chat,
    read_items,
)
from app.cli.comparison_report import ComparisonReport
from app.cli.evaluate import ConcurrencyOption, LimitOption, MaxNewTokensOption
from app.cli.promotion import Gate, Rule, gate_for
from app.cli.server import DEFAULT_SERVER, CommandFailed, KeyOption, ServerClient, ServerOption
from app.scoring.bootstrap import RESAMPLES
from app.scoring.comparison import compare
from app.scoring.items import Item
from app.scoring.measures import measure
from app.store.references import DEFAULT_ALIAS
from app.text.template import parse_template

NOT_PROMOTED = 3


class Against(StrEnum):
    """What a candidate can be compared with beside a version."""

    BASE = "base"


def compare_versions(
    candidate: Annotated[str, typer.Argument(help="Candidate, such as sentiment@candidate")],
    data: Annotated[Path, typer.Option(help="Held-out file, as for eval")],
    live: Annotated[
        str | None, typer.Argument(help="Version to compare it with; default: the task's live version")
    ] = None,
    against: Annotated[
        Against | None, typer.Option(help="Compare with the base model: the same text without the prompt")
    ] = None,
    instruction: Annotated[
        str | None,
        typer.Option(help="Compare with the base model and an instruction before the text, or a template"),
    ] = None,
    metric: Annotated[str | None, typer.Option(help="Metric that decides; default: by the data")] = None,
    promote_if: Annotated[
        Rule | None, typer.Option(help="Move the alias to the candidate if it is better, or not worse")
    ] = None,
    margin: Annotated[float, typer.Option(help="Loss that not-worse allows", min=0, max=1)] = 0.01,
    examples: Annotated[int, typer.Option(help="Number of differing outputs to show", min=0)] = 3,
    max_new_tokens: MaxNewTokensOption = None,
    limit: LimitOption = None,
    concurrency: ConcurrencyOption = 16,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap", min=0)] = 0,
    out: Annotated[Path | None, typer.Option(help="File to write the comparison to, as JSON")] = None,
    server: ServerOption = DEFAULT_SERVER,
    key: KeyOption = None,
) -> None:
    """Compare two versions on a held-out file, with paired intervals; promote the better one."""
    check_directory(out)
    items = read_items(data, limit)
    other = _Other(live, against, instruction)
    if other.is_base and is_chat(items):
        raise ValueError(
            "messages are compared between two versions; the base model has no template for them"
        )
    given = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    with ServerClient(server, key) as client:
        sides = _sides(client, candidate, other, given)
        gate = None if promote_if is None else gate_for(promote_if, margin, sides.candidate, sides.other)
        _check_held_out(sides, data, gate)
        report = _decided_by(_compare(client, sides, data, items, concurrency, seed), metric)
        report.show(examples)
        decision = _decide_and_write(client, gate, report, out, seed)
    _end(gate, report, decision)


@dataclass(frozen=True, slots=True)
class _Other:
    """What the candidate is to be compared with, as it was given; nothing: the live version."""

    version: str | None
    against: Against | None
    instruction: str | None

    def __post_init__(self) -> None:
        if sum(each is not None for each in (self.version, self.against, self.instruction)) > 1:
            raise ValueError("compare with one side: a version, --against base, or --instruction TEXT")

    @property
    def is_base(self) -> bool:
        return self.against is not None or self.instruction is not None

    def template(self, own: str | None) -> str:
        """Return what the base model reads, given the candidate's own template."""
        if self.instruction is not None and "{" in self.instruction:
            return self.instruction
        before = "" if self.instruction is None else self.instruction.replace("}", "}}") + "\n"
        return before + (own or "{inputs}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sides:
    """Both sides, pinned; `other` is None for the base model."""

    candidate: Version
    other: Version | None
    asked: tuple[Asked, Asked]


def _sides(client: ServerClient, candidate: str, other: _Other, given: dict[str, Any]) -> _Sides:
    mine = find_version(client, candidate)
    if other.is_base:
        part = mine.completion_part
        template = parse_template(other.template(part["template"]))
        base = base_asked(client, {**part["defaults"], **given}, template)
        if other.instruction is not None:
            base = replace(base, name="(instruction)")
        return _Sides(candidate=mine, other=None, asked=(mine.asked(given), base))
    theirs = _live(client, mine, other.version or f"{mine.task_id}@{DEFAULT_ALIAS}")
    return _Sides(candidate=mine, other=theirs, asked=(mine.asked(given), theirs.asked(given)))


def _live(client: ServerClient, candidate: Version, reference: str) -> Version:
    if reference == f"{candidate.task_id}@{DEFAULT_ALIAS}" and DEFAULT_ALIAS not in candidate.aliases:
        raise CommandFailed(
            f"task {candidate.task_id} has no alias {DEFAULT_ALIAS!r} yet; compare with the base model: "
            "--against base, or --instruction TEXT"
        )
    return find_version(client, reference)


def _check_held_out(sides: _Sides, data: Path, gate: Gate | None) -> None:
    """Warn where a side was trained on the data; raise ValueError where the candidate would be promoted."""
    for version in (sides.candidate, sides.other):
        if version is not None and version.was_trained_on(data):
            line = f"version {version.number} of {version.task_id} was trained on {data}"
            if gate is not None:
                raise ValueError(f"{line}, which says nothing about other data; promote on held-out lines")
            typer.echo(f"warning: {line}, so its scores are too good", err=True)


def _compare(
    client: ServerClient, sides: _Sides, data: Path, items: Sequence[Item], concurrency: int, seed: int
) -> ComparisonReport:
    choices = expected_choices(sides.candidate.choices, items)
    asked = [replace(side, choices=choices) for side in sides.asked]
    first, second = ask_all(client, asked, items, concurrency, "compare")
    pairs = list(zip(first, second, strict=True))
    both = [pair for pair in pairs if not (pair[0].error or pair[1].error)]
    if not both:
        errors = [outcome.error for pair in pairs for outcome in pair if outcome.error]
        raise CommandFailed(f"no line was answered by both sides; the first refusal: {errors[0]}")
    mine, theirs = (measure(outcomes, asked[0].labels) for outcomes in zip(*both, strict=True))
    return ComparisonReport(
        asked=sides.asked,
        data=data,
        pairs=pairs,
        differences=compare(mine, theirs, seed=seed),
        main=mine.main,
        notes=mine.notes,
    )


def _decided_by(report: ComparisonReport, metric: str | None) -> ComparisonReport:
    if metric is None:
        return report
    if metric not in report.differences:
        raise ValueError(f"--metric {metric} is none of this data's: {', '.join(report.differences)}")
    return replace(report, main=metric)


def _decide_and_write(
    client: ServerClient, gate: Gate | None, report: ComparisonReport, out: Path | None, seed: int
) -> dict[str, Any]:
    """Promote or not, and write the report, also where the task has changed meanwhile."""
    decision: dict[str, Any] = {"promoted": False}
    try:
        decision = _decide(client, gate, report)
    except CommandFailed as error:
        decision["why"] = error.message
        raise
    finally:
        if out is not None:
            content = report.as_json() | {"seed": seed, "resamples": RESAMPLES, "promotion": decision}
            out.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return decision


def _decide(client: ServerClient, gate: Gate | None, report: ComparisonReport) -> dict[str, Any]:
    """Promote the candidate where the gate lets it through; return what was done, and why."""
    if gate is None:
        return {"promoted": False, "why": "not asked for"}
    if report.num_refused:
        why = f"{report.num_refused} requests were refused, and what was refused can't be compared"
    else:
        why = gate.refusal(report.differences[report.main])
    if why:
        return {"promoted": False, "why": why}
    release = gate.promote(client, report.in_words())["release"]
    return {"promoted": True, "why": report.in_words(), "alias": gate.alias, "release": release}


def _end(gate: Gate | None, report: ComparisonReport, decision: Mapping[str, Any]) -> None:
    """Say what was decided; exit with 1 after refusals, and with 3 where nothing was promoted."""
    if decision["promoted"]:
        assert gate is not None
        typer.echo(
            f"{gate.candidate.task_id}@{gate.alias} is version {gate.candidate.number} since release "
            f"{decision['release']}"
        )
    elif gate is not None:
        typer.echo(f"nothing was promoted: {decision['why']}", err=True)
    if report.num_refused:
        raise typer.Exit(1)
    if gate is not None and not decision["promoted"]:
        raise typer.Exit(NOT_PROMOTED)


def register(cli: typer.Typer) -> None:
    """Add the command."""
    cli.command("compare")(compare_versions)
