"""`promptplex keys add, list, remove`: the file of API keys, which a running server reads again by itself."""

import datetime
from pathlib import Path
from typing import Annotated

import typer

from app.cli.tasks import print_table
from app.keys.entries import check_key
from app.keys.key import MAX_PER_MINUTE, Key, Scope, hash_of, new_key_text
from app.keys.key_file import change_keys, read_keys

keys_commands = typer.Typer(help="Add, list and remove API keys.", no_args_is_help=True)
FileOption = Annotated[
    Path, typer.Option("--keys-file", envvar="PROMPTPLEX_KEYS_FILE", help="File with the hashes of the keys")
]
DEFAULT_FILE = Path("keys.json")


@keys_commands.command("add")
def add(
    name: Annotated[
        str, typer.Argument(help="Name of the key's holder, for logs, releases and fair sharing")
    ],
    scope: Annotated[
        list[Scope], typer.Option(help="What the key may do; repeat the option for several scopes")
    ],
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="Task ids that the key may use, such as 'team-a-*', or the base model's name; default: all"
        ),
    ] = None,
    requests_per_minute: Annotated[
        int | None,
        typer.Option(min=1, max=MAX_PER_MINUTE, help="Maximum requests per minute; default: no limit"),
    ] = None,
    tokens_per_minute: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MAX_PER_MINUTE,
            help="Maximum prompt and generated tokens per minute; default: no limit",
        ),
    ] = None,
    keys_file: FileOption = DEFAULT_FILE,
) -> None:
    """Add a key and print it. It can't be shown again: the file holds only its hash."""
    text = new_key_text()
    entry = {
        "name": name,
        "sha256": hash_of(text),
        "scopes": scope,
        "tasks": task or None,
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "created": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    key = check_key(entry)

    def with_it(keys: tuple[Key, ...]) -> tuple[Key, ...]:
        if any(other.name == name for other in keys):
            raise ValueError(
                f"there is a key {name} in {keys_file}; choose another name, or remove it first with "
                f"`promptplex keys remove {name}`"
            )
        return (*keys, key)

    change_keys(keys_file, with_it)
    typer.echo(text)
    typer.echo(
        f"{name} is in {keys_file}. The key above is shown only now. Clients send it as Authorization: "
        f"Bearer <key>, commands take it from PROMPTPLEX_KEY; the server needs --keys-file {keys_file}",
        err=True,
    )


@keys_commands.command("list")
def list_keys(keys_file: FileOption = DEFAULT_FILE) -> None:
    """List the keys' names, scopes, tasks and quotas. The keys themselves aren't stored."""
    heads = ("name", "scopes", "tasks", "requests/min", "tokens/min", "created")
    print_table(heads, *map(_row, read_keys(keys_file)))


@keys_commands.command("remove")
def remove(
    name: Annotated[str, typer.Argument(help="Name of the key's holder")],
    keys_file: FileOption = DEFAULT_FILE,
) -> None:
    """Remove a key; a running server refuses it from the next request on."""

    def without_it(keys: tuple[Key, ...]) -> list[Key]:
        kept = [key for key in keys if key.name != name]
        if len(kept) == len(keys):
            known = ", ".join(key.name for key in keys) or "no key"
            raise ValueError(f"there is no key {name} in {keys_file}, which holds {known}")
        return kept

    change_keys(keys_file, without_it)
    typer.echo(f"{name} is removed", err=True)


def _row(key: Key) -> tuple[str, ...]:
    return (
        key.name,
        ",".join(sorted(key.scopes)),
        "all" if key.tasks is None else ",".join(key.tasks),
        _quota(key.requests_per_minute),
        _quota(key.tokens_per_minute),
        key.created or "-",
    )


def _quota(per_minute: int | None) -> str:
    return "-" if per_minute is None else str(per_minute)


def register(cli: typer.Typer) -> None:
    """Add the commands."""
    cli.add_typer(keys_commands, name="keys")
