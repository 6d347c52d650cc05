"""Held-out items, and what came of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_IN_NUMBERS = ("-", "\N{MINUS SIGN}", "+", ".", ",", "/")  # before their last digits


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One line of a held-out file."""

    inputs: str | Mapping[str, str] | Sequence[Mapping[str, Any]]  # as `/generate` takes them, or messages
    expected: str
    slots: tuple[str, ...] | None = None  # what must all appear in a right output
    answer: str | None = None  # what a right output ends with


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one item: the generated text, or why there is none.

    `probabilities`: of the task's choices, where the item was also classified. `ballots`: the answers that
    were voted on, where there was a vote.
    """

    item: Item
    generated: str
    error: str | None = None
    probabilities: Mapping[str, float] | None = None
    ballots: tuple[str, ...] = ()

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
    """Return whether `text` ends with `answer`, as words of their own; case and a full stop don't count.

    A number isn't the end of another one: neither -27 nor 1.27 ends with 27.
    """
    said, wanted = text.strip().casefold(), answer.strip().casefold()
    if not said.endswith(wanted):
        said, wanted = said.rstrip("."), wanted.rstrip(".") or wanted
    before = said.removesuffix(wanted)[-1:]
    is_part = before.isalnum() or (wanted[:1].isdigit() and before in _IN_NUMBERS)
    return said.endswith(wanted) and not is_part
