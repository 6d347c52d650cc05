"""`promptplex serve`: one flag for every setting, made from the settings themselves."""

import inspect
import logging
import os
from typing import Annotated, Any

import typer
from pydantic import ByteSize
from pydantic.fields import FieldInfo

from app.cli.importing import large_imports
from app.logs import configure_logging
from app.settings import Settings, load_settings, unknown_variables

log = logging.getLogger("promptplex")


def serve(**flags: str | None) -> None:
    """Serve a base model and its tasks until Ctrl-C or SIGTERM; let running requests finish first.

    Each option can also be set by an environment variable: --max-rows by PROMPTPLEX_MAX_ROWS.
    """
    settings = load_settings({name: value for name, value in flags.items() if value is not None})
    configure_logging(settings.log_format, settings.log_level)
    for warning in unknown_variables(os.environ):
        log.warning("%s", warning)
    log.info("starting (the first seconds go into importing torch and transformers)")
    with large_imports():
        from app.server.process import run_server

    raise typer.Exit(run_server(settings))


def _help(field: FieldInfo) -> str:
    value = field.default
    if value is None or value == ():
        return field.description or ""
    if isinstance(value, ByteSize):
        value = value.human_readable()
    shown = ",".join(value) if isinstance(value, tuple) else value
    return f"{field.description} (default {shown})"


def _flag(name: str, field: FieldInfo) -> inspect.Parameter:
    option = typer.Option(f"--{name.replace('_', '-')}", help=_help(field), metavar="VALUE")
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, option]
    )


def register(cli: typer.Typer) -> None:
    """Add the command; its flags can't drift from the settings, for they are made from them."""
    parameters = [_flag(name, field) for name, field in Settings.model_fields.items()]
    command: Any = serve
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    cli.command("serve")(command)
