"""What an alias means: one version, or several with weights, each asker always getting the same.

The choice is weighted rendezvous hashing: every version bids for an asker with a number that only
the version, its weight and the asker decide; the highest bid wins. Raising a version's weight can
only raise its own bids, so nobody is moved away from it, and versions added later take askers for
themselves only.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from app.errors import InvalidRequest

Meaning = int | Mapping[int, int]  # a version; or, of several, version -> weight

MAX_VERSIONS = 16
MAX_WEIGHT = 10_000


def versions_of(meaning: Meaning) -> Sequence[int]:
    """The versions that it names, ascending."""
    return [meaning] if isinstance(meaning, int) else sorted(meaning)


def choose(meaning: Meaning, task_id: str, asker: str) -> int:
    """The version that `asker` gets; the same on every machine."""
    if isinstance(meaning, int):
        return meaning
    return max(meaning, key=lambda version: (_bid(meaning[version], task_id, version, asker), version))


def weighted(weights: Mapping[int, int]) -> Meaning:
    """Check what somebody asks for: versions of weight 0 are left out, a single one is that version.

    Raises InvalidRequest.
    """
    for version, weight in weights.items():
        if not 0 <= weight <= MAX_WEIGHT:
            raise InvalidRequest(
                f"The weight of version {version} must be a whole number from 0 to {MAX_WEIGHT}.",
                param="weights",
            )
    positive = {version: weight for version, weight in sorted(weights.items()) if weight}
    if not 1 <= len(positive) <= MAX_VERSIONS:
        raise InvalidRequest(
            f'Name between 1 and {MAX_VERSIONS} versions with weights above 0, such as {{"3": 90, "4": 10}}.',
            param="weights",
        )
    return positive if len(positive) > 1 else next(iter(positive))


def meaning_as_json(meaning: Meaning) -> int | dict[str, int]:
    """A number, or an object of numbers by version."""
    if isinstance(meaning, int):
        return meaning
    return {str(version): weight for version, weight in sorted(meaning.items())}


def meaning_from_json(value: Any) -> Meaning:
    """The reverse. Raises ValueError where the value isn't what `meaning_as_json` writes."""
    if isinstance(value, dict) and all(type(weight) is int for weight in value.values()):
        meaning = {int(version): weight for version, weight in value.items()}
        if len(meaning) > 1 and min(meaning) > 0 and min(meaning.values()) > 0:
            return meaning
    elif type(value) is int and value > 0:
        return value
    raise ValueError("neither a version nor weights of versions")


def _bid(weight: int, task_id: str, version: int, asker: str) -> float:
    digest = hashlib.sha256(f"{task_id}\0{version}\0{asker}".encode()).digest()
    # 52 bits and a half: a float holds that exactly, and it is strictly between 0 and 1.
    uniform = ((int.from_bytes(digest[:8], "big") >> 12) + 0.5) / 2**52
    return weight / -math.log(uniform)
