"""The command line: `promptplex serve, train, push, list, alias, keys, store, eval, compare` and more.

Commands import what is heavy (torch, transformers) only when they run, so that the small ones
answer at once.
"""

import sys

import typer

from app import __version__
from app.cli import compare, convert, doctor, evaluate, keys, releases, serve, store, tasks, train
from app.errors import PromptplexError

cli = typer.Typer(
    name="promptplex",
    help="One frozen language model, thousands of tasks, each a small trained prompt.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
serve.register(cli)
tasks.register(cli)
train.register(cli)
convert.register(cli)
releases.register(cli)
store.register(cli)
keys.register(cli)
evaluate.register(cli)
compare.register(cli)
doctor.register(cli)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"promptplex {__version__}")
        raise typer.Exit()


@cli.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """One frozen language model, thousands of tasks, each a small trained prompt."""


def main() -> None:
    """Run a command; what goes wrong on purpose is one line on stderr and exit status 1."""
    try:
        cli()
    except (PromptplexError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    except OSError as error:
        typer.echo(f"error: {error.strerror or error}: {error.filename or ''}".rstrip(": "), err=True)
        sys.exit(1)
