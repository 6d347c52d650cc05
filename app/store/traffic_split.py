"""What an alias points at: one version, or several, of which each user always gets the same, or all.

The choice is weighted rendezvous hashing: every version bids for a user with a number that only
the version, its weight and the user decide; the highest bid wins. Raising a version's weight can
only raise its own bids, so no user is moved away from it, and versions added later take users for
themselves only.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class EnsembleTarget:
    """Several versions that answer each request together."""

    weights: Mapping[int, int]  # version -> what its answer counts


@dataclass(frozen=True, slots=True)
class SpreadTarget:
    """A version and its paraphrases, which are spread over the users: each always gets the same one."""

    version: int


# A version, several by weight (version -> weight), several at once, or one with its paraphrases.
AliasTarget = int | Mapping[int, int] | EnsembleTarget | SpreadTarget

MAX_VERSIONS = 16
MAX_WEIGHT = 10_000


def weights_of(target: AliasTarget) -> Mapping[int, int]:
    """Return the weight of each version that it names."""
    if isinstance(target, EnsembleTarget):
        return target.weights
    if isinstance(target, SpreadTarget):
        return {target.version: 1}
    return {target: 1} if isinstance(target, int) else target


def versions_of(target: AliasTarget) -> Sequence[int]:
    """Return the versions that it names, ascending."""
    return sorted(weights_of(target))


def by_weight(target: AliasTarget) -> Sequence[int]:
    """Return the versions that it names, the one with the most weight first."""
    weights = weights_of(target)
    return sorted(weights, key=lambda version: (-weights[version], version))


def choose(target: AliasTarget, task_id: str, user: str) -> int:
    """Return the version that `user` gets, of an ensemble the first one; the same on every machine."""
    if not isinstance(target, Mapping):
        return by_weight(target)[0]
    return max(target, key=lambda version: (_bid(target[version], task_id, version, user), version))


def choose_paraphrase(count: int, task_id: str, version: int, user: str) -> int:
    """Return which of `count` paraphrases `user` gets, from 0 on; the same on every machine."""
    name = f"{task_id}\0{version}"
    return max(range(count), key=lambda index: (_bid(1, name, index, user), index))


def checked_target(target: AliasTarget) -> AliasTarget:
    """Return a target without versions of weight 0; a single version stands alone. Raise InvalidRequest."""
    if isinstance(target, int | SpreadTarget):
        return target
    for version, weight in weights_of(target).items():
        if not 0 <= weight <= MAX_WEIGHT:
            raise InvalidRequest(
                f"The weight of version {version} must be a whole number from 0 to {MAX_WEIGHT}.",
                param="weights",
            )
    positive = {version: weight for version, weight in sorted(weights_of(target).items()) if weight}
    fewest = 2 if isinstance(target, EnsembleTarget) else 1
    if not fewest <= len(positive) <= MAX_VERSIONS:
        what = "An ensemble has" if fewest == 2 else "Name"
        raise InvalidRequest(
            f"{what} between {fewest} and {MAX_VERSIONS} versions with weights above 0, such as "
            '{"3": 90, "4": 10}.',
            param="weights",
        )
    if isinstance(target, EnsembleTarget):
        return EnsembleTarget(positive)
    return positive if len(positive) > 1 else next(iter(positive))


def target_as_json(target: AliasTarget) -> Any:
    """Return a number, an object of numbers by version, or an object that says what else it is."""
    if isinstance(target, EnsembleTarget):
        return {"weights": _weights_as_json(target.weights), "ensemble": True}
    if isinstance(target, SpreadTarget):
        return {"version": target.version, "spread_paraphrases": True}
    return target if isinstance(target, int) else _weights_as_json(target)


def is_plain(targets: Iterable[AliasTarget]) -> bool:
    """Return whether these are what records have held from the first release on: versions and weights."""
    return all(isinstance(target, int | Mapping) for target in targets)


def target_from_json(value: Any) -> AliasTarget:
    """Return the reverse. Raise ValueError where the value isn't what `target_as_json` writes."""
    if not isinstance(value, dict):
        return _version_from_json(value)
    if value.keys() == {"weights", "ensemble"} and value["ensemble"] is True:
        return EnsembleTarget(_weights_from_json(value["weights"]))
    if value.keys() == {"version", "spread_paraphrases"} and value["spread_paraphrases"] is True:
        return SpreadTarget(_version_from_json(value["version"]))
    return _weights_from_json(value)


def _version_from_json(value: Any) -> int:
    if type(value) is int and value > 0:
        return value
    raise ValueError("not a version")


def _weights_as_json(weights: Mapping[int, int]) -> dict[str, int]:
    return {str(version): weight for version, weight in sorted(weights.items())}


def _weights_from_json(value: Any) -> Mapping[int, int]:
    if isinstance(value, dict) and all(type(weight) is int for weight in value.values()):
        weights = {int(version): weight for version, weight in value.items()}
        if len(weights) > 1 and min(weights) > 0 and min(weights.values()) > 0:
            return weights
    raise ValueError("not weights of versions")


def _bid(weight: int, name: str, number: int, user: str) -> float:
    digest = hashlib.sha256(f"{name}\0{number}\0{user}".encode()).digest()
    # 52 bits and a half: a float holds that exactly, and it is strictly between 0 and 1.
    uniform = ((int.from_bytes(digest[:8], "big") >> 12) + 0.5) / 2**52
    return weight / -math.log(uniform)
