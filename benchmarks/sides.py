"""What a side is: something that does the work, and says when tokens came."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from benchmarks.work import Ask, Work


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One request's new tokens, and when they came: seconds since the whole work was handed over."""

    token_ids: tuple[int, ...]
    first_token: float | None = None  # None: this side doesn't say
    last_token: float | None = None

    @property
    def time_per_token(self) -> float | None:
        """Mean seconds from one token to the next."""
        if self.first_token is None or self.last_token is None or len(self.token_ids) < 2:
            return None
        return (self.last_token - self.first_token) / (len(self.token_ids) - 1)


class Side(Protocol):
    """One way to do the work."""

    name: str
    uses_prompts: bool  # False: it does the work without any prompt, however many virtual tokens there are

    @property
    def work(self) -> Work:
        """What it does."""
        ...

    def run(self, asks: Sequence[Ask]) -> list[Answer]:
        """Answers in the order of `asks`; of a sample of them, where all would take too long."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...
