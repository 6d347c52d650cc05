"""Train, dev and test by the hash of an input, so that lines may be added or reordered.

An input's hash is a number from 0 to 1, the same in every file: the lowest are test, the highest dev. Small
data gives more of itself, and where it grows past that, lines only go over to train. Equal inputs, whatever
their answers, are in one split. Each label has a few lines in each.
"""

import hashlib
import json
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from app.training.examples import Example

SMALL = 1000  # inputs, below which more of them are held out
_SHARES = {"small": (0.15, 0.2), "usual": (0.1, 0.1)}  # dev, test
_LEAST = 8  # of a label, or of all, in dev and in test, where an eighth of them is as much


@dataclass(frozen=True, slots=True)
class Splits:
    """Examples in the order of their file."""

    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    test: tuple[Example, ...]


def plain_text(example: Example) -> str:
    """Return what is asked, in one text without case, width and repeated white space."""
    if example.messages:
        asked: object = [[each.role, each.content, *sorted(each.others.items())] for each in example.messages]
    else:
        asked = example.inputs if isinstance(example.inputs, str) else dict(sorted(example.inputs.items()))
    text = asked if isinstance(asked, str) else json.dumps(asked, ensure_ascii=False)
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def by_input(examples: Iterable[Example]) -> dict[str, list[Example]]:
    """Return the examples of each input, as `plain_text` has it."""
    groups = defaultdict(list)
    for example in examples:
        groups[plain_text(example)].append(example)
    return dict(groups)


def split_by_hash(
    groups: Mapping[str, Sequence[Example]],
    *,
    split_seed: int = 0,
    dev_share: float | None = None,
    test_share: float | None = None,
    by_label: bool = False,
) -> Splits:
    """Return the examples in three splits; shares of None are chosen by size, and 0 leaves a split empty."""
    usual = _SHARES["small" if len(groups) < SMALL else "usual"]
    dev = usual[0] if dev_share is None else dev_share
    test = usual[1] if test_share is None else test_share
    strata = defaultdict(list)
    for text, examples in groups.items():
        strata[min(each.output for each in examples) if by_label else ""].append(text)
    where = dict[str, str]()
    for texts in strata.values():
        where |= _places(texts, split_seed, dev, test)
    chosen: dict[str, list[Example]] = {"train": [], "dev": [], "test": []}
    for text, examples in groups.items():
        chosen[where[text]].extend(examples)
    return Splits(
        **{name: tuple(sorted(found, key=lambda each: each.line)) for name, found in chosen.items()}
    )


def _places(texts: Sequence[str], seed: int, dev: float, test: float) -> dict[str, str]:
    """Return the split of each input of a stratum."""
    ranked = sorted((_number(text, seed), text) for text in texts)
    least = min(_LEAST, len(ranked) // 8)
    num_test = max(sum(number < test for number, _ in ranked), least) if test else 0
    num_dev = max(sum(number >= 1 - dev for number, _ in ranked), least) if dev else 0
    num_test = min(num_test, len(ranked) - 1)
    num_dev = min(num_dev, len(ranked) - 1 - num_test)
    names = ["test"] * num_test + ["train"] * (len(ranked) - num_test - num_dev) + ["dev"] * num_dev
    return {text: name for (_, text), name in zip(ranked, names, strict=True)}


def _number(text: str, seed: int) -> float:
    """Return a number from 0 to below 1 that depends on the text and the seed alone."""
    digest = hashlib.sha256(f"{seed}\0{text}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
