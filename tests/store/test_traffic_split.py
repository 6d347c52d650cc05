"""Weighted aliases: shares are as asked, everybody sticks, and a growing share moves nobody away."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import InvalidRequest
from app.store.traffic_split import (
    MAX_VERSIONS,
    MAX_WEIGHT,
    EnsembleTarget,
    SpreadTarget,
    by_weight,
    checked_target,
    choose,
    choose_paraphrase,
    is_plain,
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
    assert checked_target(EnsembleTarget({2: 5, 1: 5, 3: 0})) == EnsembleTarget({1: 5, 2: 5})
    for alone in ({}, {1: 1}, {1: 1, 2: 0}, {1: -1, 2: 1}, dict.fromkeys(range(1, MAX_VERSIONS + 2), 1)):
        with pytest.raises(InvalidRequest):
            checked_target(EnsembleTarget(alone))


@given(weights)
def test_json_and_back(target: dict[int, int]) -> None:
    assert target_from_json(target_as_json(target)) == target
    assert target_from_json(target_as_json(EnsembleTarget(target))) == EnsembleTarget(target)
    assert target_from_json(target_as_json(SpreadTarget(7))) == SpreadTarget(7)
    assert target_from_json(target_as_json(7)) == 7


def test_an_ensemble_answers_with_all_its_versions() -> None:
    target = EnsembleTarget({3: 1, 1: 5, 2: 5})
    assert by_weight(target) == [1, 2, 3]
    assert {choose(target, "t", user) for user in USERS[:50]} == {1}
    assert is_plain([1, {1: 1, 2: 1}])
    assert not is_plain([1, target])
    assert not is_plain([SpreadTarget(1)])


def test_paraphrases_are_spread_evenly_and_stick() -> None:
    chosen = {user: choose_paraphrase(4, "t", 3, user) for user in USERS}
    counts = Counter(chosen.values())
    assert sorted(counts) == [0, 1, 2, 3]
    assert all(abs(count / len(USERS) - 0.25) < 0.03 for count in counts.values())
    for user, index in chosen.items():
        assert choose_paraphrase(5, "t", 3, user) in (4, index), "one more takes for itself only"
    assert [choose_paraphrase(4, "t", 3, user) for user in USERS[:12]] == SPREAD, "on record"


SPREAD = [0, 0, 3, 2, 1, 3, 0, 3, 1, 0, 1, 3]


@pytest.mark.parametrize(
    "value",
    [
        *(0, -1, True, 1.0, "1", None, {}, {"1": 1}, {"1": 1, "2": 0}, {"a": 1, "2": 1}),
        {"weights": {"1": 1, "2": 1}, "ensemble": False},
        {"weights": {"1": 1}, "ensemble": True},
        {"weights": 3, "ensemble": True},
        {"weights": {"1": 1, "2": 1}, "ensemble": True, "version": 1},
        {"version": 0, "spread_paraphrases": True},
        {"version": True, "spread_paraphrases": True},
        {"version": 1, "spread_paraphrases": 1},
        {"version": 1},
    ],
)
def test_json_that_is_no_meaning(value: object) -> None:
    with pytest.raises(ValueError, match=r"not a version|not weights|invalid literal"):
        target_from_json(value)
