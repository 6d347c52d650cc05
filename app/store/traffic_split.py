"""What an alias points at: one version, or several by weight, of which each user always gets the same.

The choice is weighted rendezvous hashing: every version bids for a user with a number that only
the version, its weight and the user decide; the highest bid wins. Raising a version's weight can
only raise its own bids, so no user is moved away from it, and versions added later take users for
themselves only.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from app.errors import InvalidRequest

AliasTarget = int | Mapping[int, int]  # a version; or, of several, version -> weight

MAX_VERSIONS = 16
MAX_WEIGHT = 10_000


def versions_of(target: AliasTarget) -> Sequence[int]:
    """Return the versions that it names, ascending."""
    return [target] if isinstance(target, int) else sorted(target)


def choose(target: AliasTarget, task_id: str, user: str) -> int:
    """Return the version that `user` gets; the same on every machine."""
    if isinstance(target, int):
        return target
    return max(target, key=lambda version: (_bid(target[version], task_id, version, user), version))


def checked_target(target: AliasTarget) -> AliasTarget:
    """Return a target without versions of weight 0; a single version stands alone. Raise InvalidRequest."""
    if isinstance(target, int):
        return target
    for version, weight in target.items():
        if not 0 <= weight <= MAX_WEIGHT:
            raise InvalidRequest(
                f"The weight of version {version} must be a whole number from 0 to {MAX_WEIGHT}.",
                param="weights",
            )
    positive = {version: weight for version, weight in sorted(target.items()) if weight}
    if not 1 <= len(positive) <= MAX_VERSIONS:
        raise InvalidRequest(
            f'Name between 1 and {MAX_VERSIONS} versions with weights above 0, such as {{"3": 90, "4": 10}}.',
            param="weights",
        )
    return positive if len(positive) > 1 else next(iter(positive))


def target_as_json(target: AliasTarget) -> int | dict[str, int]:
    """Return a number, or an object of numbers by version."""
    if isinstance(target, int):
        return target
    return {str(version): weight for version, weight in sorted(target.items())}


def target_from_json(value: Any) -> AliasTarget:
    """Return the reverse. Raise ValueError where the value isn't what `target_as_json` writes."""
    if isinstance(value, dict) and all(type(weight) is int for weight in value.values()):
        target = {int(version): weight for version, weight in value.items()}
        if len(target) > 1 and min(target) > 0 and min(target.values()) > 0:
            return target
    elif type(value) is int and value > 0:
        return value
    raise ValueError("neither a version nor weights of versions")


def _bid(weight: int, task_id: str, version: int, user: str) -> float:
    digest = hashlib.sha256(f"{task_id}\0{version}\0{user}".encode()).digest()
    # 52 bits and a half: a float holds that exactly, and it is strictly between 0 and 1.
    uniform = ((int.from_bytes(digest[:8], "big") >> 12) + 0.5) / 2**52
    return weight / -math.log(uniform)
