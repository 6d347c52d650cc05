"""Which inputs belong to pretraining, to prompt training, and to the held-out set: a hash decides.

An example's *key* (a review's text, a record's name, a date, an expression) is hashed together with its
domain. The same key always lands in the same split, so the three sets cannot overlap, however many examples
are drawn.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from hashlib import sha256


class Split(Enum):
    """The three sets."""

    PRETRAIN = "pretrain"
    PROMPT = "prompt"
    HELDOUT = "heldout"


# domain -> (share held out, share for prompt training); the rest is for pretraining.
SHARES: dict[str, tuple[float, float]] = {"arithmetic": (1 / 7, 1 / 7)}
DEFAULT_SHARES = (0.10, 0.10)


@dataclass(frozen=True, slots=True)
class Example:
    """One input with its answer under each of several tasks (``answers``: variant -> expected output)."""

    domain: str
    text: str
    key: str
    answers: dict[str, str]
    slots: tuple[str, ...] = field(
        default=()
    )  # values that a good output repeats; empty where it makes no sense


def split_of(domain: str, key: str) -> Split:
    """The split that owns ``key``."""
    digest = sha256(f"{domain}\0{key}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    heldout, prompt = SHARES.get(domain, DEFAULT_SHARES)
    if position < heldout:
        return Split.HELDOUT
    return Split.PROMPT if position < heldout + prompt else Split.PRETRAIN


def draw(rng: random.Random, make: Callable[[random.Random], Example], split: Split) -> Example:
    """Call ``make`` until its example belongs to ``split``."""
    while True:
        example = make(rng)
        if split_of(example.domain, example.key) is split:
            return example


def distinct(make: Callable[[random.Random], Example], split: Split, count: int, seed: int) -> list[Example]:
    """``count`` examples of ``split`` with different texts."""
    rng = random.Random(seed)
    found: dict[str, Example] = {}
    for _ in range(count * 100):
        example = draw(rng, make, split)
        found.setdefault(example.text, example)
        if len(found) == count:
            return list(found.values())
    raise ValueError(f"only {len(found)} distinct examples of {split.value}, {count} were asked for")
