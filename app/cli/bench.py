"""`promptplex bench`: the benchmark of the source tree, with its own options."""

import importlib.util

import typer

_CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def bench(context: typer.Context) -> None:
    """Measure Promptplex beside PEFT, transformers and vLLM on this machine; see bench --help."""
    missing = [
        name for name in ("benchmarks", "peft", "matplotlib") if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} not found: the benchmark runs from a source checkout whose "
            "environment `make bench` made"
        )
    from benchmarks.__main__ import main

    main(context.args)


def register(cli: typer.Typer) -> None:
    """Add the command."""
    cli.command("bench", context_settings=_CONTEXT)(bench)
