"""Held-out inputs that are nearly those of train: MinHash finds candidates, shared shingles decide.

Texts are compared as sets of their stretches of five characters, without case and white space that repeats,
of which the 256 with the least hashes stand for all. The least values of 32 hash functions are kept of each
set; two sets that share four of them in a row, at one of eight places, are compared (of pairs with 80% in
common 98% are found). Texts count up to their first 2,048 characters, and held-out ones are drawn where there
are many, so that 100,000 lines take seconds. In texts below 20 characters a small difference says much, so
they aren't compared.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from app.strict_json import excerpt
from app.training.examples import Example
from app.training.splits import Splits, plain_text

SIMILAR = 0.8  # of all shingles of two texts, as many are in both
MAX_HELD_OUT = 5_000  # inputs of a split that are compared with train
MAX_COMPARED = 200_000  # pairs
MIN_CHARS, MAX_CHARS = 20, 2_048  # of a text
_SHINGLE = 5
_KEPT = 256  # shingles of a text
_ROWS, _BANDS = 4, 8
_Hashes = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Pair:
    """A held-out input, and one of train that is nearly the same."""

    held_out: Example
    trained: Example


def near_duplicate_warnings(splits: Splits) -> Iterator[str]:
    """Yield a line for each held-out split that has near-duplicates in train."""
    held_out = {"dev": _drawn(splits.dev), "test": _drawn(splits.test)}
    train = [example for example in splits.train if len(plain_text(example)) >= MIN_CHARS]
    pairs = near_duplicates(train, [*held_out["dev"], *held_out["test"]])
    for name, examples in held_out.items():
        own = set(map(id, examples))
        found = [pair for pair in pairs if id(pair.held_out) in own]
        if found:
            yield (
                f"at least {len(found)} of {len(examples)} inputs of {name} are nearly those of train, so "
                f"scores may be too good: {_shown(found[0].held_out)} is like {_shown(found[0].trained)}"
            )


def _drawn(examples: Sequence[Example]) -> Sequence[Example]:
    examples = [example for example in examples if len(plain_text(example)) >= MIN_CHARS]
    return examples[:: max(1, -(-len(examples) // MAX_HELD_OUT))]


def _shown(example: Example) -> str:
    return f"{example.place} {excerpt(plain_text(example), 60)}"


def near_duplicates(train: Sequence[Example], held_out: Sequence[Example]) -> list[Pair]:
    """Return what of `held_out` is nearly in `train`, in its order, each once."""
    shingles = [_shingles(plain_text(example)) for example in held_out]
    buckets = defaultdict[bytes, list[int]](list)
    for index, each in enumerate(shingles):
        for key in _keys(each):
            buckets[key].append(index)
    found: dict[int, Example] = {}
    compared = 0
    for example in train:
        if len(found) == len(held_out) or compared >= MAX_COMPARED:
            break
        own = _shingles(plain_text(example))
        candidates = {index for key in _keys(own) for index in buckets.get(key, ())} - found.keys()
        compared += len(candidates)
        found |= {index: example for index in candidates if _similarity(own, shingles[index]) >= SIMILAR}
    return [Pair(held_out[index], found[index]) for index in sorted(found)]


def _shingles(text: str) -> _Hashes:
    """Return the least hashes of all stretches of a text, sorted, each once."""
    codes = np.frombuffer(text[:MAX_CHARS].encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    count = max(len(codes) - _SHINGLE + 1, 1)
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(min(_SHINGLE, len(codes))):
        hashes = hashes * _BASE + codes[offset : offset + count]
    return np.unique(_mixed(hashes))[:_KEPT]


def _mixed(values: _Hashes) -> _Hashes:
    """Spread values over all 64 bits (the last steps of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


_BASE = np.uint64(0x100000001B3)
_SALTS = _mixed(np.arange(1, _ROWS * _BANDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def _keys(shingles: _Hashes) -> list[bytes]:
    """Return the set's place in each band."""
    salted = (shingles[:, None] ^ _SALTS) * np.uint64(0x9E3779B97F4A7C15)
    rows = salted.min(axis=0).reshape(_BANDS, _ROWS)
    return [bytes([band]) + row.tobytes() for band, row in enumerate(rows)]


def _similarity(one: _Hashes, other: _Hashes) -> float:
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / (len(one) + len(other) - common)
