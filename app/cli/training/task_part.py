"""The `task` part that a run trains for: what the user gives, completed from the data."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from app.cli.asking import NO_CHOICE, expected_choices
from app.serving.publishing.task_settings import LabelledChoice, completion_part, parse_choices
from app.training.base import TrainingBase
from app.training.encoding import encode_examples
from app.training.examples import Dataset
from app.training.templates import choose_template

Part = dict[str, Any]
Say = Callable[[str], None]


def as_served(base: TrainingBase, task: Part, *, generation_config: str) -> TrainingBase:
    """Return the base with inputs cut, and answers begun, as the server and the task's defaults do it."""
    defaults = task.get("defaults") or {}
    token = defaults.get("forced_bos_token")
    forced = base.forced_bos_id if generation_config == "auto" else None
    if token is not None:
        forced = base.encoder.tokenizer.token_id(token)
    return replace(base, forced_bos_id=forced, truncate=defaults.get("truncate"))


def with_template(given: Part, dataset: Dataset, base: TrainingBase, say: Say) -> Part:
    """Return the task part with a template that fits, where it has none.

    Raise InvalidRequest: what it has is wrong, or none fits.
    """
    has_own = given.get("template") is not None or given.get("chain") is not None
    chosen = choose_template(dataset, base, completion_part(given)["template"] if has_own else None)
    for warning in chosen.warnings:
        say(f"warning: {warning}")
    return given if has_own else given | {"template": chosen.source}


def shown_answers(part: Part, examples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return examples of completions as the task answers them; a chain's answer they don't show."""
    if part.get("chain"):
        return []
    marker = (part.get("reasoning") or {}).get("answer_after")
    if marker is None:
        return [dict(example) for example in examples]
    parts = ((example, *example["expected"].partition(marker)) for example in examples)
    return [{**example, "expected": answer.lstrip()} for example, _, found, answer in parts if found]


def longest_answer(dataset: Dataset, base: TrainingBase, template: str | None) -> int:
    """Return its tokens; the test examples have no say in how the task is served.

    Raise InvalidRequest: the template doesn't take a line, or the base has no room.
    """
    encoded = encode_examples([*dataset.train, *dataset.dev], base, template)
    return max(len(each.target) for each in encoded)


def with_choices(given: Part, dataset: Dataset) -> Part:
    """Return the task part with the data's labels, where it has no choices."""
    return ({"choices": list(dataset.choices)} if dataset.choices else {}) | given


def with_limit(given: Part, longest: int, *, spare: float, wanted: int | None, say: Say) -> Part:
    """Return the task part with `max_new_tokens`: what is wanted, else given, else room for the answers.

    `longest`: tokens of the longest answer, `spare` times which there is room for.
    """
    defaults = {"max_new_tokens": math.ceil(longest * spare)} | given.get("defaults", {})
    if wanted is not None:
        defaults["max_new_tokens"] = wanted
    limit = defaults["max_new_tokens"]
    if limit is not None and limit < longest - 1:  # without EOS
        say(f"warning: max_new_tokens is {limit}, but answers have up to {longest} tokens; longer are cut")
    return given | {"defaults": defaults}


def scored_choices(task: Part, dataset: Dataset, say: Say) -> list[LabelledChoice]:
    """Return the task's choices under the names that all examples expect; none where one expects another."""
    choices = parse_choices(task.get("choices") or ())
    items = [example.item for example in (*dataset.train, *dataset.dev, *dataset.test)]
    found = expected_choices(choices, items)
    if choices and not found:
        say(f"warning: {NO_CHOICE}")
    return list(found)
