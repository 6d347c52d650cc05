"""How right answers are: exact match, accuracy and slot coverage of a held-out file, with 95% intervals.

A held-out file holds one JSON object a line:

    {"inputs": "3 * (4 + 5)", "expected": "4 + 5 = 9; 3 * 9 = 27; answer: 27", "answer": "27"}
    {"inputs": "name[The Eagle], food[Thai]", "expected": "The Eagle is ...", "slots": ["The Eagle", "Thai"]}

`inputs` is what `/generate` takes. `answer` and `slots` are optional: what a right output ends with,
and what must all appear in it.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
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
    """What came of one item: the generated text, or why there is none."""

    item: Item
    generated: str
    error: str | None = None

    @property
    def is_exact(self) -> bool:
        """The whole output, but for white space around it."""
        return self.error is None and self.generated.strip() == self.item.expected.strip()

    @property
    def is_right(self) -> bool:
        """The output ends with the answer, as words of their own; case and a full stop don't count."""
        said = self.generated.strip().rstrip(".").casefold()
        answer = (self.item.answer or "").strip().casefold()
        before = said.removesuffix(answer)
        return self.error is None and said.endswith(answer) and not before[-1:].isalnum()

    @property
    def num_slots_present(self) -> int:
        """How many of the item's slot values appear in the output, letter by letter."""
        return sum(slot in self.generated for slot in self.item.slots or ())

    @property
    def has_every_slot(self) -> bool:
        """All of them."""
        return self.error is None and self.num_slots_present == len(self.item.slots or ())


@dataclass(frozen=True, slots=True)
class Share:
    """`count` of `total`."""

    count: int
    total: int

    @property
    def share(self) -> float:
        """Between 0 and 1."""
        return self.count / self.total

    def interval(self, z: float = 1.96) -> tuple[float, float]:
        """Wilson's score interval (1927); 95% for z = 1.96."""
        centre = self.share + z * z / (2 * self.total)
        variance = self.share * (1 - self.share) / self.total
        spread = z * math.sqrt(variance + z * z / (4 * self.total**2))
        scale = 1 + z * z / self.total
        return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)

    def as_json(self) -> dict[str, Any]:
        """Count, total, share and interval."""
        low, high = self.interval()
        return {
            "count": self.count,
            "total": self.total,
            "share": round(self.share, 4),
            "interval_95": [round(low, 4), round(high, 4)],
        }


def read_items(path: Path) -> list[Item]:
    """The items of a held-out file. ValueError names the first line that isn't one."""
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


def scores(outcomes: Sequence[Outcome]) -> dict[str, Share]:
    """`exact` of all; `accuracy` where items have answers; `every_slot`, `slot_values` where slots."""
    found = {"exact": _count(outcomes, lambda outcome: outcome.is_exact)}
    answered = [outcome for outcome in outcomes if outcome.item.answer is not None]
    if answered:
        found["accuracy"] = _count(answered, lambda outcome: outcome.is_right)
    slotted = [outcome for outcome in outcomes if outcome.item.slots]
    if slotted:
        found["every_slot"] = _count(slotted, lambda outcome: outcome.has_every_slot)
        present = sum(outcome.num_slots_present for outcome in slotted)
        found["slot_values"] = Share(present, sum(len(outcome.item.slots or ()) for outcome in slotted))
    return found


def _count(outcomes: Sequence[Outcome], holds: Callable[[Outcome], bool]) -> Share:
    return Share(sum(holds(outcome) for outcome in outcomes), len(outcomes))
