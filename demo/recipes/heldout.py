"""Held-out inputs as ``promptplex eval`` reads them: a JSON object a line.

``<task>.jsonl`` comes from the generators, from the split that neither pretraining nor prompt training saw.
``<task>.handwritten.jsonl`` is written by hand, in words that the generators don't use.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from demo.recipes.handwritten import BY_VARIANT
from demo.recipes.splits import Example, Split, distinct
from demo.recipes.tasks import Task, TaskRecipe, read

HELDOUT = Path("demo/heldout")
COUNT = 300
_SEED = 99


def examples(task: Task, count: int = COUNT) -> list[Example]:
    """``count`` inputs that neither pretraining nor prompt training saw."""
    return distinct(task.make, Split.HELDOUT, count, _SEED)


def row(task: Task, example: Example) -> dict[str, Any]:
    """One line: ``slots`` must all be in a good answer; ``answer`` is what a right one ends with."""
    expected = read(task, example.answers[task.variant])
    line: dict[str, Any] = {"inputs": example.text, "expected": expected}
    if task.bar == "every_slot":
        line["slots"] = list(example.slots)
    if task.choices:
        line["answer"] = expected
    return line


def encode(task: Task, chosen: list[Example]) -> str:
    """The text of a file."""
    return "".join(json.dumps(row(task, example), ensure_ascii=False) + "\n" for example in chosen)


def files(task: Task) -> dict[str, str]:
    """File name -> text, of every held-out file of a task."""
    texts = {f"{task.name}.jsonl": encode(task, examples(task, task.num_kept))}
    if isinstance(task, TaskRecipe):
        for kind, make in task.also.items():
            drawn = distinct(make, Split.HELDOUT, COUNT, _SEED)
            texts[f"{task.name}.{kind}.jsonl"] = encode(task, drawn)
    if task.variant in BY_VARIANT:
        texts[f"{task.name}.handwritten.jsonl"] = encode(task, BY_VARIANT[task.variant]())
    return texts


def write_all(tasks: Iterable[Task], target: Path = HELDOUT) -> None:
    """Write the files of all tasks; a task that two bases have in common has one file."""
    target.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        for name, text in files(task).items():
            (target / name).write_text(text)
