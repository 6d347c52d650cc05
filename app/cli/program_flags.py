"""Flags of `promptplex push` for what a task says beyond one completion; each sets a field of its part."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli.importing import large_imports

_PANEL = "Reasoning, chains, votes, instructions"
# Flag -> (type, field of the task part, help).
_FLAGS: Mapping[str, tuple[Any, tuple[str, ...], str]] = {
    "reasoning_marker": (
        str,
        ("reasoning", "answer_after"),
        "Marker in the output, behind which the answer begins",
    ),
    "steps_end": (str, ("reasoning", "steps_end"), "Text that ends each step before the answer"),
    "effort": (str, ("reasoning", "effort"), "Token budgets of reasoning by effort, such as low=32,high=512"),
    "chain_template": (
        str,
        ("chain", "template"),
        "Template that each step reads: the input fields and {so_far}, or {last}",
    ),
    "step_ends": (str, ("chain", "step_ends"), "Text that ends each step of the chain"),
    "done": (str, ("chain", "done"), "Marker in a step of the chain, behind which the answer begins"),
    "max_steps": (int, ("chain", "max_steps"), "Maximum number of steps of the chain"),
    "max_step_tokens": (int, ("chain", "max_step_tokens"), "Maximum number of tokens of a step"),
    "chain_step": (
        list[str],
        ("chain", "steps"),
        "Task that makes the next step; may be repeated, the last one goes on",
    ),
    "vote": (int, ("vote", "n"), "Number of samples to vote on; the most frequent answer wins"),
    "calibration_temperature": (
        float,
        ("calibration", "temperature"),
        "Temperature that divides the log-probabilities of the choices",
    ),
    "paraphrase": (list[str], ("paraphrases",), "Other template that requests may choose; may be repeated"),
    "few_shot": (
        Path,
        ("few_shot",),
        "File of worked examples to put before each input; formats as for `train`",
    ),
}


def program_flags() -> list[inspect.Parameter]:
    """Return the parameters of a command for the flags."""
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                kind | None,
                typer.Option(f"--{name.replace('_', '-')}", help=text, rich_help_panel=_PANEL),
            ],
        )
        for name, (kind, _, text) in _FLAGS.items()
    ]


def with_flags(task: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a task part with the flags that were given in place of its own fields.

    Raise ValueError: a flag can't be read, or the part has no object where its field belongs.
    """
    changed = dict(task)
    for name, (_, (first, *rest), _) in _FLAGS.items():
        value = given.get(name)
        if value in (None, []):
            continue
        value = _READ[name](value) if name in _READ else value
        if rest:
            part = changed.get(first) or {}
            if not isinstance(part, dict):
                raise ValueError(f"{first} of the task file must be an object, so that a flag can change it")
            value = {**part, rest[0]: value}
        changed[first] = value
    return changed


def _budgets(text: str) -> dict[str, int]:
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(tokens.isdecimal() for _, _, tokens in pairs):
        raise ValueError(f"--effort must name tokens by effort, such as low=32,high=512, not {text!r}")
    return {effort.strip(): int(tokens) for effort, _, tokens in pairs}


def _examples(file: Path) -> list[dict[str, Any]]:
    with large_imports():
        from app.training.readers import read_examples

    examples = read_examples(file)
    if any(each.messages for each in examples):
        raise ValueError(f"{file} holds chats; the examples of --few-shot have inputs and an output")
    return [{"inputs": each.inputs, "output": each.output} for each in examples]


_READ: Mapping[str, Callable[[Any], Any]] = {
    "effort": _budgets,
    "few_shot": _examples,
    "chain_step": lambda tasks: [{"task": task} for task in tasks],
}
