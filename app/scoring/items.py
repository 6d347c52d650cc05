"""Held-out items, and what came of them.

A held-out file holds one JSON object a line:

    {"inputs": "3 * (4 + 5)", "expected": "4 + 5 = 9; 3 * 9 = 27; answer: 27", "answer": "27"}
    {"inputs": "name[The Eagle], food[Thai]", "expected": "The Eagle is ...", "slots": ["The Eagle", "Thai"]}

`inputs` is what `/generate` takes. `answer` and `slots` are optional: what a right output ends with,
and what must all appear in it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_REQUIRED = {"inputs", "expected"}
_OPTIONAL = {"slots", "answer"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One line of a held-out file."""

    inputs: str | Mapping[str, str]
    expected: str
    slots: tuple[str, ...] | None = None
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one item: the generated text, or why there is none.

    `probabilities`: of the task's choices, where the item was also classified.
    """

    item: Item
    generated: str
    error: str | None = None
    probabilities: Mapping[str, float] | None = None

    @property
    def is_exact(self) -> bool:
        """The whole output, but for white space around it."""
        return self.error is None and self.generated.strip() == self.item.expected.strip()

    @property
    def is_right(self) -> bool:
        """The output ends with the answer, as words of their own; case and a full stop don't count."""
        return self.error is None and ends_with(self.generated, self.item.answer or "")

    @property
    def num_slots_present(self) -> int:
        """How many of the item's slot values appear in the output, letter by letter."""
        return sum(slot in self.generated for slot in self.item.slots or ())

    @property
    def has_every_slot(self) -> bool:
        """All of them."""
        return self.error is None and self.num_slots_present == len(self.item.slots or ())


def ends_with(text: str, answer: str) -> bool:
    """Return whether `text` ends with `answer`, as words of their own; case and a full stop don't count."""
    said, wanted = text.strip().rstrip(".").casefold(), answer.strip().casefold()
    return said.endswith(wanted) and not said.removesuffix(wanted)[-1:].isalnum()


def read_items(path: Path) -> list[Item]:
    """Return the items of a held-out file. Raise ValueError, which names the first line that isn't one."""
    items = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                items.append(_item(json.loads(line)))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
    if not items:
        raise ValueError(f"{path} holds no items; each line is a JSON object with 'inputs' and 'expected'")
    return items


def _item(fields: Any) -> Item:
    if not isinstance(fields, dict):
        raise ValueError("expected a JSON object with 'inputs' and 'expected'")
    if missing := _REQUIRED - fields.keys():
        raise ValueError(f"{', '.join(sorted(missing))} is missing")
    if unknown := fields.keys() - _REQUIRED - _OPTIONAL:
        raise ValueError(f"unknown field {', '.join(sorted(unknown))}; optional ones are answer and slots")
    if not isinstance(fields["inputs"], str | dict):
        raise ValueError("'inputs' must be a string, or an object with the template's fields")
    slots, answer = fields.get("slots"), fields.get("answer")
    if not isinstance(fields["expected"], str) or not isinstance(answer, str | None):
        raise ValueError("'expected' and 'answer' must be strings")
    if slots is not None and not _are_strings(slots):
        raise ValueError("'slots' must be a list of strings that aren't empty")
    return Item(
        inputs=fields["inputs"],
        expected=fields["expected"],
        slots=None if slots is None else tuple(slots),
        answer=answer,
    )


def _are_strings(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) and value for value in values)
