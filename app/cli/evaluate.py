"""`promptplex eval`: a held-out file through a running server, and how much of it was right."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli.score_table import score_line
from app.cli.server import DEFAULT_SERVER, CommandFailed, KeyOption, NoAnswer, Row, ServerClient, ServerOption
from app.scoring.items import Item, Outcome, read_items
from app.scoring.measures import Score, measure

_BASE = "(base model)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Who answers: one version of a task, or the base model itself."""

    reference: str | None  # pinned, so that an alias that moves meanwhile changes nothing
    name: str  # for people: `sentiment@3`
    digest: str | None


def evaluate(
    data: Annotated[
        Path, typer.Option(help="File of JSON lines with inputs and expected, optionally answer and slots")
    ],
    task: Annotated[str | None, typer.Option(help="Task, or task@version; default: the base model")] = None,
    template: Annotated[
        str | None, typer.Option(help="Template for the inputs, such as 'Review: {text}'")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Maximum number of new tokens in an answer; default: the task's", min=1)
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Number of lines to use; default: all", min=1)] = None,
    concurrency: Annotated[int, typer.Option(help="Number of concurrent requests", min=1, max=256)] = 16,
    out: Annotated[Path | None, typer.Option(help="File to write scores and outputs to, as JSON")] = None,
    server: ServerOption = DEFAULT_SERVER,
    key: KeyOption = None,
) -> None:
    """Evaluate a task on a held-out file: exact match, accuracy, slot coverage."""
    items = read_items(data)[:limit]
    if template is not None and "{text}" not in template:
        raise ValueError("--template must hold {text}, where the input goes")
    parameters = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    with ServerClient(server, key) as client:
        asked = _pin(client, task)
        bodies = [_body(asked, _inputs(item, template), parameters) for item in items]
        began = time.monotonic()
        outcomes = _ask_all(client, items, bodies, concurrency)
    measures = measure(outcomes)
    scores = measures.scores()
    report = _report(asked, data, outcomes, scores, time.monotonic() - began) | {"template": template}
    if out is not None:
        out.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    _print(asked, data, outcomes, scores)
    for note in measures.notes:
        typer.echo(note, err=True)
    if any(outcome.error for outcome in outcomes):
        raise typer.Exit(1)


def _pin(client: ServerClient, task: str | None) -> Asked:
    """The version that the reference means now."""
    if task is None:
        client.call("GET", "/health")
        return Asked(reference=None, name=_BASE, digest=None)
    task_id, _, selector = task.partition("@")
    history = client.call("GET", f"/tasks/{task_id}")
    if selector.startswith("sha256:") or selector.isdecimal():
        version = selector
    else:
        alias = selector or "live"
        if alias not in history["aliases"]:
            known = ", ".join(history["aliases"]) or "none"
            raise CommandFailed(f"task {task_id} has no alias {alias!r}; it has: {known}")
        version = _only_version(task_id, alias, history["aliases"][alias])
    for row in history["versions"]:
        if version in (str(row["version"]), row["version_digest"]):
            digest = row["version_digest"]
            return Asked(reference=f"{task_id}@{digest}", name=f"{task_id}@{row['version']}", digest=digest)
    raise CommandFailed(f"task {task_id} has no version {version}; `promptplex show {task_id}` lists them")


def _only_version(task_id: str, alias: str, meaning: int | dict[str, int]) -> str:
    if isinstance(meaning, int):
        return str(meaning)
    raise CommandFailed(
        f"{task_id}@{alias} is several versions by weight; evaluate one of them: "
        + ", ".join(f"{task_id}@{version}" for version in meaning)
    )


def _inputs(item: Item, template: str | None) -> Any:
    if template is None:
        return item.inputs
    if not isinstance(item.inputs, str):
        raise ValueError("--template takes inputs that are strings; these are objects with fields")
    return template.replace("{text}", item.inputs)


def _body(asked: Asked, inputs: Any, parameters: dict[str, Any]) -> Row:
    body: dict[str, Any] = {"inputs": inputs, "parameters": {**parameters, "do_sample": False}}
    return body if asked.reference is None else body | {"task_id": asked.reference}


def _ask_all(
    client: ServerClient, items: Sequence[Item], bodies: Sequence[Row], concurrency: int
) -> list[Outcome]:
    """Many requests at a time, so that the server can batch them; a progress bar on stderr."""

    def ask(item: Item, body: Row) -> Outcome:
        try:
            return Outcome(item, str(client.call("POST", "/generate", json=body)["generated_text"]))
        except NoAnswer:
            raise
        except CommandFailed as refusal:
            return Outcome(item, "", error=str(refusal))

    with (
        ThreadPoolExecutor(concurrency) as threads,
        typer.progressbar(length=len(items), label="eval", file=typer.get_text_stream("stderr")) as bar,
    ):
        outcomes = []
        for outcome in threads.map(ask, items, bodies):
            outcomes.append(outcome)
            bar.update(1)
    return outcomes


def _report(
    asked: Asked, data: Path, outcomes: Sequence[Outcome], scores: Mapping[str, Score], seconds: float
) -> dict[str, Any]:
    return {
        "task": asked.name,
        "version_digest": asked.digest,
        "data": data.name,
        "data_sha256": hashlib.sha256(data.read_bytes()).hexdigest(),
        "scores": {name: score.as_json() for name, score in scores.items()},
        "errors": sum(outcome.error is not None for outcome in outcomes),
        "seconds": round(seconds, 2),
        "outputs": [_output(outcome) for outcome in outcomes],
    }


def _output(outcome: Outcome) -> dict[str, Any]:
    line = {
        "inputs": outcome.item.inputs,
        "expected": outcome.item.expected,
        "generated": outcome.generated,
        "exact": outcome.is_exact,
    }
    return line if outcome.error is None else line | {"error": outcome.error}


def _print(asked: Asked, data: Path, outcomes: Sequence[Outcome], scores: Mapping[str, Score]) -> None:
    typer.echo(f"{asked.name} on {data}: {len(outcomes)} inputs")
    for score in scores.values():
        typer.echo(score_line(score))
    failed = [outcome for outcome in outcomes if outcome.error]
    if failed:
        typer.echo(f"{len(failed)} requests were refused; the first: {failed[0].error}", err=True)


def register(cli: typer.Typer) -> None:
    """Add the command."""
    cli.command("eval")(evaluate)
