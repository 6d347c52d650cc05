"""`promptplex store check, sweep`: look for damage in a store's files, collect garbage."""

from pathlib import Path
from typing import Annotated

import typer

from app.store.gc import GRACE_SECONDS, collect_garbage
from app.store.prompt_store import PromptStore, open_store
from app.store.scrub import scrub

store_commands = typer.Typer(help="Check and clean up a store's files.", no_args_is_help=True)
PathArgument = Annotated[Path, typer.Argument(help="Directory of the store")]
_DAY = 86_400.0


@store_commands.command("check")
def check(path: PathArgument = Path("prompts_store")) -> None:
    """Verify every record and prompt; exit with status 1 if any is damaged."""
    store = _existing(path)
    findings = list(scrub(store))
    for finding in findings:
        typer.echo(finding.message)
    tasks, blobs = len(store.list_tasks()), len(store.blobs.digests())
    typer.echo(f"{tasks} tasks and {blobs} prompts checked: {len(findings) or 'no'} damage found")
    if findings:
        raise typer.Exit(1)


@store_commands.command("sweep")
def sweep(
    path: PathArgument = Path("prompts_store"),
    days: Annotated[
        float,
        typer.Option(min=0, help="Keep files that are younger than this: an upload may be in progress"),
    ] = GRACE_SECONDS / _DAY,
) -> None:
    """Remove unfinished files, and prompts that no version refers to."""
    swept = collect_garbage(_existing(path), older_than=days * _DAY)
    typer.echo(f"removed {swept.leftovers} unfinished files and {swept.blobs} unreferenced prompts")


def _existing(path: Path) -> PromptStore:
    if not path.is_dir():
        raise ValueError(f"there is no store at {path}")
    return open_store(path)


def register(cli: typer.Typer) -> None:
    """Add the commands."""
    cli.add_typer(store_commands, name="store")
