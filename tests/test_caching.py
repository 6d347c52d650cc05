"""Both caches against models: what is kept, what goes first, and who makes what is missing."""

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.caching import LruCache, SingleFlightCache
from tests.waiting import wait_until

STEPS = st.lists(st.tuples(st.sampled_from(("put", "get", "pop")), st.integers(0, 6)), max_size=60)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 20), STEPS)
def test_the_least_recently_used_goes_first(bound: int, steps: list[tuple[str, int]]) -> None:
    """Numbers weigh themselves, and more with each put, as values that grow do."""
    cache: LruCache[int, list[int]] = LruCache(bound, sum)
    model: dict[int, list[int]] = {}  # the least recently used first
    for step, key in steps:
        if step == "pop":
            assert cache.pop(key) == model.pop(key, None)
        elif step == "get":
            assert cache.get(key) == model.get(key)
            if key in model:
                model[key] = model.pop(key)
        else:
            grown = [*model.pop(key, []), key]
            cache.put(key, grown)
            model[key] = grown
            while sum(map(sum, model.values())) > bound and len(model) > 1:
                del model[next(iter(model))]
        cache.check_integrity()
        assert list(cache) == list(model)
        assert cache.weight == sum(map(sum, model.values()))


def test_what_is_missing_is_made_once_for_all_who_want_it() -> None:
    cache: SingleFlightCache[str, object] = SingleFlightCache(2)
    gate, made, found = threading.Event(), list[object](), list[object]()

    def make() -> object:
        made.append(object())
        assert gate.wait(60)
        return made[-1]

    threads = [threading.Thread(target=lambda: found.append(cache.get("a", make))) for _ in range(8)]
    for thread in threads:
        thread.start()
    wait_until(lambda: bool(made))
    assert cache.get("b", lambda: None) is None, "another key waits for nothing"
    gate.set()
    for thread in threads:
        thread.join()
    assert found == made * 8
    assert cache.get("b", lambda: 1) is None, "None is a value like any other"


def test_a_failure_is_each_callers_own_and_not_kept() -> None:
    cache: SingleFlightCache[str, int] = SingleFlightCache(2)
    gate, errors = threading.Event(), list[Exception]()

    def fail() -> int:
        assert gate.wait(60)
        raise ValueError

    def want() -> None:
        try:
            cache.get("a", fail)
        except ValueError as error:
            errors.append(error)

    threads = [threading.Thread(target=want) for _ in range(4)]
    for thread in threads:
        thread.start()
    gate.set()
    for thread in threads:
        thread.join()
    assert len({id(error) for error in errors}) == 4
    assert not len(cache)
    assert cache.get("a", lambda: 5) == 5


def test_only_the_very_value_is_forgotten() -> None:
    cache: SingleFlightCache[str, object] = SingleFlightCache(2)
    old, new = object(), object()
    cache.put("a", old)
    cache.put("a", new)
    cache.forget("a", old)
    assert cache.get("a", object) is new
    cache.forget("a", new)
    assert cache.get("a", lambda: old) is old
    for key in "bc":
        cache.get(key, object)
    assert len(cache) == 2


@pytest.mark.parametrize("bound", [0, 1])
def test_the_newest_value_stays(bound: int) -> None:
    cache: LruCache[str, int] = LruCache(bound, lambda value: value)
    for key in "ab":
        cache.put(key, 7)
    assert list(cache) == ["b"]
