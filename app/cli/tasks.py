"""`promptplex push, list, show, validate`: tasks on a server or in a store's files."""

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli.importing import large_imports
from app.cli.program_flags import program_flags, with_flags
from app.cli.server import DEFAULT_SERVER, KeyOption, Row, ServerOption
from app.cli.targets import ServerTarget, StoreTarget, Target
from app.one_line import on_one_line
from app.prompt import Prompt, TaskType
from app.serving.program_settings import ProgramSettings
from app.serving.publishing.bundle import Bundle, read_bundle, text_bundle
from app.serving.publishing.upload import draft_version
from app.sites import Embedding, Site
from app.store.saved_tensors import SavedTensor
from app.store.validation import validate_prompt

StoreOption = Annotated[
    Path | None, typer.Option("--store", help="Use this store directory directly instead of a server")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON")]


def target_of(server: str, store: Path | None, key: str | None) -> Target:
    """Return a store's files where one is named, else a server."""
    return ServerTarget(server, key) if store is None else StoreTarget(store)


def push(
    path: Annotated[
        Path | None,
        typer.Argument(
            help="PEFT's save_pretrained directory, a .safetensors file, or a directory with a task.json"
        ),
    ] = None,
    task: Annotated[str | None, typer.Option(help="Task id; default: the directory's name")] = None,
    template: Annotated[
        str | None,
        typer.Option(help="Input template, such as 'Review: {text}'; without PATH: publish a text-only task"),
    ] = None,
    alias: Annotated[
        str | None,
        typer.Option(
            help="Alias to point at the new version, or none; default: live, where the version is new"
        ),
    ] = None,
    server: ServerOption = DEFAULT_SERVER,
    store: StoreOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
    **given: Any,
) -> None:
    """Push a trained prompt or a text-only task as a new version of a task.

    The flags come before the fields of a task.json.
    """
    bundle = replace(_bundle(path, template, given), alias=alias)
    answer = target_of(server, store, key).push(task or _named(bundle), bundle)
    if as_json:
        typer.echo(json.dumps(answer, indent=2))
        return
    name = alias or "live"
    stays = "no alias moved" if alias else "not new, so no alias moved"
    where = f"{name} since release {answer['release']}" if answer.get("release") else stays
    learned = f", {answer['virtual_tokens']} virtual tokens" if answer["virtual_tokens"] else ""
    typer.echo(f"{answer['task_id']}@{answer['version']} ({answer['kind']}{learned}): {where}")
    for warning in answer.get("warnings", ()):
        typer.echo(f"warning: {warning}", err=True)
    _warn_of_examples(answer)


def _warn_of_examples(answer: Row) -> None:
    """Examples show that a prompt was trained on a sibling of the base, also where no record says so."""
    examples = answer.get("examples") or []
    missed = [example for example in examples if not example["matches"]]
    if missed:
        first, task_id = missed[0], answer["task_id"]
        way_out = {None: "", 1: f" `promptplex retire {task_id}` takes the task out of service"}.get(
            answer.get("release"), f" `promptplex rollback {task_id}` goes back"
        )
        typer.echo(
            f"warning: {len(missed)} of {len(examples)} examples differ: {first['inputs']!r} gave "
            f"{first['generated']!r}, expected {first['expected']!r}; "
            f"was the prompt trained on this base?{way_out}",
            err=True,
        )


def _bundle(path: Path | None, template: str | None, flags: Row) -> Bundle:
    if path is not None:
        bundle = read_bundle(path, template=template)
    elif template is None and flags.get("chain_template") is None:
        raise ValueError("name a directory to push, or give --template for a text-only task")
    else:
        bundle = text_bundle(template)
    return replace(bundle, task=with_flags(bundle.task or {}, flags) or None)


def _named(bundle: Bundle) -> str:
    if not bundle.name:
        raise ValueError("name the task with --task ID")
    return bundle.name


def list_tasks(
    server: ServerOption = DEFAULT_SERVER,
    store: StoreOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """List tasks with their live version, kind, virtual tokens, and whether the server can serve them."""
    rows = target_of(server, store, key).tasks()
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    print_table(("task", "version", "kind", "virtual", "servable"), *map(_list_row, rows))


def show(
    task: Annotated[str, typer.Argument(help="Task id")],
    server: ServerOption = DEFAULT_SERVER,
    store: StoreOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show a task's aliases, versions, templates and releases."""
    answer = target_of(server, store, key).task(task)
    if as_json:
        typer.echo(json.dumps(answer, indent=2))
    else:
        _print_task(answer)


def validate(
    path: Annotated[Path, typer.Argument(help="Prompt to check: as for `push`")],
    model: Annotated[
        str | None,
        typer.Option(help="Load this base (a directory or hub id) and check that the prompt fits it"),
    ] = None,
) -> None:
    """Validate a prompt without publishing it: its file, and with --model that it fits the base."""
    bundle = read_bundle(path)
    beside: list[SavedTensor] = []
    prompt = draft_version(bundle, beside.append).prompt
    if prompt is None:
        typer.echo("a text-only task: no prompt to check")
    elif model is None:
        also = f" (beside it: {', '.join(tensor.name for tensor in beside)})" if beside else ""
        typer.echo(
            f"{prompt_in_words(prompt)}\na well-formed prompt{also}; give --model to check it against a base"
        )
    else:
        _check_fit(bundle, model)


def prompt_in_words(prompt: Prompt) -> str:
    """Return its kind, its virtual tokens and its digest."""
    return f"{prompt.kind} of {_lengths(prompt)} virtual tokens, sha256:{prompt.digest}"


def _lengths(prompt: Prompt) -> str:
    """Return the number of virtual tokens; for an encoder-decoder, that of each place after its name."""
    if prompt.task_type is TaskType.CAUSAL_LM:
        return str(prompt.num_virtual_tokens)
    lengths = ((place, prompt.length(place)) for place in (*Embedding, *Site))
    return ", ".join(f"{place} {length}" for place, length in lengths if length)


def _check_fit(bundle: Bundle, model: str) -> None:
    """Import once more, for this base, and check the prompt against it."""
    with large_imports():
        from app.models.loading import load_base
        from app.serving.publishing.own_embeddings import OwnEmbeddings

    base = load_base(model, progress=lambda line: typer.echo(line, err=True))
    own, geometry = OwnEmbeddings(base.backbone), base.backbone.geometry
    prompt = draft_version(bundle, own.check, geometry).prompt
    assert prompt is not None
    for warning in own.warnings:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(prompt_in_words(prompt))
    validate_prompt(prompt, geometry)
    typer.echo(f"fits {base.name}")


def _list_row(row: Row) -> tuple[str, ...]:
    servable = row.get("servable")
    verdict = "-" if servable is None else "yes" if servable else f"no: {row.get('not_servable_because')}"
    return (row["id"], str(row["version"] or "-"), row["kind"], str(row["virtual_tokens"]), verdict)


def _print_task(answer: Row) -> None:
    _print_line(f"task     {answer['id']}" + (" (retired)" if answer["retired"] else ""))
    for alias, target in answer["aliases"].items():
        _print_line(f"alias    {alias} -> {target_in_words(target)}")
    for version in answer["versions"]:
        template = f", template {version['template']!r}" if version.get("template") else ""
        _print_line(
            f"version  {version['version']}: {version['kind']}, {version['virtual_tokens']} virtual{template}"
        )
        _print_program(version)
        _print_training(version["provenance"])
    for release in answer["releases"]:
        aliases = ", ".join(
            f"{alias} -> {target_in_words(target)}" for alias, target in release["aliases"].items()
        )
        why = f" ({release['why']})" if release["why"] else ""
        _print_line(
            f"release  {release['number']}: {release['action']}, {aliases or 'no alias'}, "
            f"by {release['who']} at {release['at']}{why}"
        )


def _print_program(version: Row) -> None:
    """Print what the version says beyond one completion; of lists, how many there are."""
    for name in ProgramSettings.model_fields:
        if value := version.get(name):
            _print_line(f"         {name}: {len(value) if isinstance(value, list) else json.dumps(value)}")


def _print_training(provenance: Row) -> None:
    """Print how the version was trained, and what its trainer measured, if the upload said so."""
    training = provenance.get("training") or {}
    facts = [
        f"{training['method']}, step {training['best_step']}" if "best_step" in training else "",
        f"seed {training['seed']}" if "seed" in training else "",
        f"data sha256:{training['data_sha256'][:12]}" if training.get("data_sha256") else "",
    ]
    if known := ", ".join(filter(None, facts)):
        _print_line(f"         trained: {known}")
    if metrics := provenance.get("metrics"):
        _print_line("         measured: " + ", ".join(f"{name} {value:g}" for name, value in metrics.items()))


def _print_line(line: str) -> None:
    """Print what uploaders wrote, whatever it holds."""
    typer.echo(on_one_line(line))


def target_in_words(target: int | Row) -> str:
    """Return `3`, `3 (90), 4 (10)` by weight, or what else a target says."""
    if isinstance(target, int):
        return str(target)
    if "version" in target:
        spread = " (each user one of its paraphrases)" if target.get("spread_paraphrases") else ""
        return f"{target['version']}{spread}"
    if "weights" in target:
        together = " together" if target.get("ensemble") else ""
        return target_in_words(target["weights"]) + together
    return ", ".join(f"{version} ({weight})" for version, weight in target.items())


def print_table(*table: tuple[str, ...]) -> None:
    """Print rows of cells, the heads first, in columns as wide as their widest cell."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    for row in table:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        typer.echo(line.rstrip())


def _with_program_flags(command: Any) -> Any:
    own = [each for each in inspect.signature(command).parameters.values() if each.name != "given"]
    parameters = [*own, *program_flags()]
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    return command


def register(cli: typer.Typer) -> None:
    """Add the commands."""
    cli.command("push")(_with_program_flags(push))
    cli.command("list")(list_tasks)
    cli.command("show")(show)
    cli.command("validate")(validate)
