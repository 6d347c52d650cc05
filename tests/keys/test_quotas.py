"""Quotas by a clock of the test's own."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import RateLimited
from app.keys.key import Key, Scope
from app.keys.quotas import Quotas


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def key(requests: int | None = None, tokens: int | None = None, name: str = "k") -> Key:
    return Key(
        name=name,
        sha256="",
        scopes=frozenset({Scope.GENERATE}),
        requests_per_minute=requests,
        tokens_per_minute=tokens,
    )


def wait_of(quotas: Quotas, who: Key, *, needs_tokens: bool = True) -> int:
    """0: taken; else the seconds of Retry-After."""
    try:
        quotas.take(who, needs_tokens=needs_tokens)
    except RateLimited as error:
        return math.ceil(error.retry_after)
    return 0


def test_a_minute_may_be_used_at_once_and_comes_back_evenly() -> None:
    clock = Clock()
    quotas, who = Quotas(clock), key(requests=6)
    assert [wait_of(quotas, who) for _ in range(8)] == [0] * 6 + [10, 10]  # what is refused isn't counted
    clock.now += 9.9
    assert wait_of(quotas, who) == 1
    clock.now += 0.1
    assert [wait_of(quotas, who), wait_of(quotas, who)] == [0, 10]
    clock.now += 3600
    assert [wait_of(quotas, who) for _ in range(7)] == [0] * 6 + [10]


def test_tokens_go_into_debt() -> None:
    clock = Clock()
    quotas, who = Quotas(clock), key(tokens=60)
    assert wait_of(quotas, who) == 0
    quotas.charge(who, 159)
    assert wait_of(quotas, who) == 100
    assert wait_of(quotas, who, needs_tokens=False) == 0  # listing needs no tokens
    clock.now += 99
    assert wait_of(quotas, who) == 1
    clock.now += 1
    assert wait_of(quotas, who) == 0


def test_the_longer_wait_counts_and_keys_do_not_share() -> None:
    clock = Clock()
    quotas, both, other = Quotas(clock), key(requests=1, tokens=60), key(requests=1, name="other")
    assert wait_of(quotas, both) == 0
    assert wait_of(quotas, both) == 60
    quotas.charge(both, 200)
    with pytest.raises(RateLimited, match="60 tokens a minute") as caught:
        quotas.take(both, needs_tokens=True)
    assert caught.value.retry_after == pytest.approx(141)
    assert wait_of(quotas, other) == 0


def test_without_quotas_nothing_is_bounded() -> None:
    quotas, who = Quotas(Clock()), key()
    quotas.charge(who, 10**12)
    assert not any(wait_of(quotas, who) for _ in range(100))


def test_use_is_kept_for_keys_that_stay_only() -> None:
    quotas, stays, goes = Quotas(Clock()), key(requests=1, name="stays"), key(requests=1, name="goes")
    assert [wait_of(quotas, each) for each in (stays, goes)] == [0, 0]
    quotas.keep({"stays"})
    assert [wait_of(quotas, each) for each in (stays, goes)] == [60, 0]


@given(
    rate=st.integers(1, 1000),
    steps=st.lists(st.floats(0, 30, allow_nan=False), min_size=1, max_size=60),
)
def test_never_more_than_a_burst_and_the_rate_and_waiting_is_enough(rate: int, steps: list[float]) -> None:
    clock = Clock()
    begin, quotas, who = clock.now, Quotas(clock), key(requests=rate)
    for taken, step in enumerate(steps, 1):
        clock.now += step
        wait = wait_of(quotas, who)
        if wait:
            clock.now += wait
            assert wait_of(quotas, who) == 0
        assert taken <= rate + (clock.now - begin) * rate / 60 + 1e-3
