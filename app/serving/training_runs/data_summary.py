"""What training would read of data files, before anything is trained: a program, run like a run's process.

A large file takes a process's full attention for seconds, which serving must not feel.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from typing_extensions import TypedDict

from app.errors import InvalidRequest
from app.training.examples import Dataset, Example
from app.training.readers import read_dataset
from app.validation import closed

_MODULE = "app.serving.training_runs.data_summary"
MAX_CHARS = 2000  # of a text that is shown
MAX_SHOWN = 5  # examples
MAX_CHOICES = 256
MAX_WARNINGS = 50

_Texts = Annotated[str | dict[str, str], Field(description="Inputs; of a chat, its last message")]


@closed
class ShownExample(TypedDict):
    """An example as it was read."""

    inputs: _Texts
    output: str
    place: Annotated[str, Field(description="File and line")]


@closed
class DataSummary(TypedDict):
    """What was read."""

    form: Annotated[str, Field(description="Fields of a line")]
    num_examples: Annotated[dict[str, int], Field(description="Of train, dev and test, without duplicates")]
    choices: Annotated[list[str], Field(description="Labels, where the data has some")]
    fields: Annotated[list[str], Field(description="Of the inputs, for the template; of plain text: text")]
    warnings: list[str]
    examples: Annotated[list[ShownExample], Field(description=f"The first {MAX_SHOWN} to train on")]


def summarise(dataset: Dataset) -> DataSummary:
    """Return what a person needs to see whether the data was understood."""
    first = dataset.train[0]
    splits = {"train": dataset.train, "dev": dataset.dev, "test": dataset.test}
    return {
        "form": str(dataset.form),
        "num_examples": {name: len(examples) for name, examples in splits.items()},
        "choices": [_cut(choice) for choice in dataset.choices[:MAX_CHOICES]],
        "fields": ["text"] if isinstance(first.inputs, str) else list(first.inputs),
        "warnings": [_cut(line) for line in dataset.warnings[:MAX_WARNINGS]],
        "examples": [_shown(example) for example in dataset.train[:MAX_SHOWN]],
    }


def _shown(example: Example) -> ShownExample:
    inputs = example.messages[-1].content if example.messages else example.inputs
    shown = _cut(inputs) if isinstance(inputs, str) else {name: _cut(text) for name, text in inputs.items()}
    return {"inputs": shown, "output": _cut(example.output), "place": example.place}


def _cut(text: str) -> str:
    return text if len(text) <= MAX_CHARS else text[: MAX_CHARS - 1] + "…"


def summary_command(out: Path, options: dict[str, Any], paths: Sequence[Path]) -> list[str]:
    """Return the command that writes a summary to `out`; `options` are arguments of `read_dataset`."""
    return [sys.executable, "-P", "-m", _MODULE, str(out), json.dumps(options), *map(str, paths)]


def main(out: str, options: str, *paths: str) -> None:
    """Write the summary as JSON, or print what is wrong as the line that commands end with."""
    try:
        dataset = read_dataset([Path(path) for path in paths], **json.loads(options))
    except InvalidRequest as error:
        sys.exit(f"error: {error.message}")
    Path(out).write_text(json.dumps(summarise(dataset)))


if __name__ == "__main__":
    main(*sys.argv[1:])
