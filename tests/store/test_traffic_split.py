"""Weighted aliases: shares are as asked, everybody sticks, and a growing share moves nobody away."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import InvalidRequest
from app.store.traffic_split import (
    MAX_VERSIONS,
    MAX_WEIGHT,
    checked_target,
    choose,
    target_as_json,
    target_from_json,
)

USERS = [f"user-{number}" for number in range(4000)]
weights = st.dictionaries(st.integers(1, 20), st.integers(1, MAX_WEIGHT), min_size=2, max_size=MAX_VERSIONS)


def shares(target: dict[int, int], task: str = "t") -> dict[str, int]:
    return {user: choose(target, task, user) for user in USERS}


def test_shares_are_as_asked() -> None:
    counts = Counter(shares({3: 90, 4: 10}).values())
    assert abs(counts[4] / len(USERS) - 0.1) < 0.02  # four standard deviations
    assert counts[3] + counts[4] == len(USERS)


def test_the_choice_is_the_same_everywhere() -> None:
    """These are on record: another version of this program must not move anybody."""
    chosen = [choose({1: 50, 2: 50}, "sentiment", f"u-{number}") for number in range(12)]
    assert chosen == [choose({2: 50, 1: 50}, "sentiment", f"u-{number}") for number in range(12)]
    assert chosen == RECORDED


RECORDED = [2, 2, 2, 1, 2, 1, 1, 2, 1, 1, 1, 1]


def test_tasks_split_their_askers_differently() -> None:
    one, other = shares({1: 50, 2: 50}, "a"), shares({1: 50, 2: 50}, "b")
    same = sum(one[user] == other[user] for user in USERS) / len(USERS)
    assert 0.45 < same < 0.55


@given(weights, st.data())
def test_a_growing_share_moves_nobody_away(before: dict[int, int], data: st.DataObject) -> None:
    version = data.draw(st.sampled_from(sorted(before)))
    after = before | {version: data.draw(st.integers(before[version], MAX_WEIGHT))}
    for user in USERS[:200]:
        if choose(before, "t", user) == version:
            assert choose(after, "t", user) == version
        else:
            assert choose(after, "t", user) in (version, choose(before, "t", user))


@given(weights, st.integers(21, 30), st.integers(1, MAX_WEIGHT))
def test_a_new_version_takes_for_itself_only(before: dict[int, int], new: int, weight: int) -> None:
    for user in USERS[:200]:
        assert choose(before | {new: weight}, "t", user) in (new, choose(before, "t", user))


def test_what_can_be_asked_for() -> None:
    assert checked_target({2: 5, 1: 5}) == {1: 5, 2: 5}
    assert checked_target({1: 0, 2: 7}) == 2, "one version that remains is that version"
    for refused in ({}, {1: 0}, {1: -1}, {1: MAX_WEIGHT + 1}, dict.fromkeys(range(1, MAX_VERSIONS + 2), 1)):
        with pytest.raises(InvalidRequest):
            checked_target(refused)


@given(weights)
def test_json_and_back(target: dict[int, int]) -> None:
    assert target_from_json(target_as_json(target)) == target
    assert target_from_json(target_as_json(7)) == 7


@pytest.mark.parametrize(
    "value", [0, -1, True, 1.0, "1", None, {}, {"1": 1}, {"1": 1, "2": 0}, {"a": 1, "2": 1}]
)
def test_json_that_is_no_meaning(value: object) -> None:
    with pytest.raises(ValueError, match=r"neither|invalid literal"):
        target_from_json(value)
