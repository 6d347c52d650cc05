"""`promptplex convert`: what only PyTorch or NumPy open becomes a canonical file, ready to push."""

from pathlib import Path
from typing import Annotated

import typer

from app.cli.tasks import prompt_in_words
from app.prompt import TaskType


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="A BART directory of PrefixTuning, TGIS' encoder.pt and decoder.pt (or their directory), "
            "or a .npy file of google-research's prompt-tuning"
        ),
    ],
    output: Annotated[Path, typer.Argument(help="The .safetensors file to write")],
    task_type: Annotated[
        TaskType | None,
        typer.Option(help="Kind of the base; default: the format's, of decoder.pt alone CAUSAL_LM"),
    ] = None,
) -> None:
    """Convert a trained prompt of another format, and write a file to push."""
    from app.cli.converters import convert_prompt  # brings torch, which takes seconds

    if output.suffix != ".safetensors":
        raise ValueError(f"{output} must be named .safetensors")
    prompt = convert_prompt(source, task_type)
    with output.open("xb") as file:
        file.write(prompt.data)
    typer.echo(f"{output}: {prompt_in_words(prompt)}")


def register(cli: typer.Typer) -> None:
    """Add the command."""
    cli.command("convert")(convert)
