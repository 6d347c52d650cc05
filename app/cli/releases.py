"""`promptplex alias, rollback, retire, restore`: where a task's aliases point, and whether it is served."""

from typing import Annotated

import typer

from app.cli.server import DEFAULT_SERVER, KeyOption, Row, ServerOption
from app.cli.tasks import StoreOption, target_in_words, target_of
from app.serving.task_rows import TargetFields
from app.store.traffic_split import AliasTarget, EnsembleTarget, SpreadTarget

TaskArgument = Annotated[str, typer.Argument(help="Task id")]
WhyOption = Annotated[str, typer.Option("--why", help="Reason to record in the release")]


def alias(
    task: TaskArgument,
    name: Annotated[str, typer.Argument(help="Alias, such as live or canary")],
    versions: Annotated[
        list[str], typer.Argument(help="Version, such as 3, or versions with weights, such as 3=90 4=10")
    ],
    ensemble: Annotated[
        bool,
        typer.Option(
            "--ensemble", help="Let all these versions answer each request; the weighted majority wins"
        ),
    ] = False,
    spread_paraphrases: Annotated[
        bool,
        typer.Option("--spread-paraphrases", help="Give each user one of the paraphrases, always the same"),
    ] = False,
    expected_release: Annotated[
        int | None,
        typer.Option(help="Fail unless this is the number of the task's last release (0: there is none)"),
    ] = None,
    why: WhyOption = "",
    server: ServerOption = DEFAULT_SERVER,
    store: StoreOption = None,
    key: KeyOption = None,
) -> None:
    """Point an alias at a version, at several by weight (each user stays on one), or at an ensemble."""
    target = _target(
        _parse_weights(versions, is_split=not (ensemble or spread_paraphrases)), ensemble, spread_paraphrases
    )
    answer = target_of(server, store, key).move_alias(task, name, target, expected_release, why)
    _print_moved(answer)


def rollback(
    task: TaskArgument,
    alias: Annotated[str, typer.Option("--alias", help="Alias to move")] = "live",
    why: WhyOption = "",
    server: ServerOption = DEFAULT_SERVER,
    store: StoreOption = None,
    key: KeyOption = None,
) -> None:
    """Point an alias at its previous version or versions; repeat to go back further."""
    answer = target_of(server, store, key).rollback(task, alias, why)
    _print_moved(answer)


def retire(
    task: TaskArgument,
    why: WhyOption = "",
    server: ServerOption = DEFAULT_SERVER,
    store: StoreOption = None,
    key: KeyOption = None,
) -> None:
    """Take a task out of service after its running requests; `restore` brings it back."""
    answer = target_of(server, store, key).retire(task, why)
    typer.echo(f"{task} is retired since release {answer['release']}")


def restore(
    task: TaskArgument,
    why: WhyOption = "",
    server: ServerOption = DEFAULT_SERVER,
    store: StoreOption = None,
    key: KeyOption = None,
) -> None:
    """Bring a retired task back into service, with its aliases as they were."""
    answer = target_of(server, store, key).restore(task, why)
    typer.echo(f"{task} is served again since release {answer['release']}")


def _print_moved(answer: Row) -> None:
    target = {name: answer[name] for name in TargetFields.__annotations__ if name in answer}
    typer.echo(
        f"{answer['task_id']}@{answer['alias']} is version {target_in_words(target)} since release "
        f"{answer['release']}"
    )


def _target(weights: dict[int, int], ensemble: bool, spread_paraphrases: bool) -> AliasTarget:
    if ensemble and spread_paraphrases:
        raise ValueError("--ensemble is of several versions, --spread-paraphrases of one; give one of them")
    if ensemble:
        return EnsembleTarget(weights)
    if not spread_paraphrases:
        return weights
    if len(weights) > 1:
        raise ValueError("--spread-paraphrases spreads those of one version; name one")
    return SpreadTarget(next(iter(weights)))


def _parse_weights(texts: list[str], *, is_split: bool) -> dict[int, int]:
    weights: dict[int, int] = {}
    for text in texts:
        version, equals, weight = text.partition("=")
        if not version.isdecimal() or (equals and not weight.isdecimal()) or int(version) in weights:
            raise ValueError(f"{text!r} is not a version (3) or a version with its weight (3=90), each once")
        weights[int(version)] = int(weight) if equals else 1
    if len(weights) > 1 and is_split and not all("=" in text for text in texts):
        raise ValueError("several versions need weights: 3=90 4=10")
    return weights


def register(cli: typer.Typer) -> None:
    """Add the commands."""
    cli.command("alias")(alias)
    cli.command("rollback")(rollback)
    cli.command("retire")(retire)
    cli.command("restore")(restore)
