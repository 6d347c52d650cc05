"""Caches within a bound: the least recently used entry goes first; values are made once for all callers."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class LruCache(Generic[K, V]):
    """Values by key, within a bound of their weights. Not thread-safe; the owner locks."""

    def __init__(self, bound: int, weigh: Callable[[V], int] = lambda value: 1) -> None:
        """`bound`: of the sum of `weigh` over all values. The newest value stays, whatever it weighs."""
        self._bound = bound
        self._weigh = weigh
        self._entries: OrderedDict[K, tuple[V, int]] = OrderedDict()  # each with its weight
        self.weight = 0  # of all values

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[K]:
        """Keys, the least recently used first."""
        return iter(self._entries)

    def __contains__(self, key: K) -> bool:
        return key in self._entries

    def __getitem__(self, key: K) -> V:
        """Return the value, now the most recently used one. Raise KeyError."""
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def get(self, key: K) -> V | None:
        """Return the value, now the most recently used one, or None."""
        try:
            return self[key]
        except KeyError:
            return None

    def put(self, key: K, value: V) -> None:
        """Keep the value, in place of an older one, and drop others while all weigh too much."""
        self.pop(key)
        self._entries[key] = value, self._weigh(value)
        self.weight += self._entries[key][1]
        while self.weight > self._bound and len(self) > 1:
            self.pop(next(iter(self)))

    def pop(self, key: K) -> V | None:
        """Drop the value and return it, or None where there is none."""
        value, weight = self._entries.pop(key, (None, 0))
        self.weight -= weight
        return value

    def check_integrity(self) -> None:
        """Assert that the sum is right and within the bound."""
        assert self.weight == sum(weight for _, weight in self._entries.values())
        assert self.weight <= self._bound or len(self) == 1


class SingleFlightCache(Generic[K, V]):
    """Makes values that are missing, each once at a time: other threads wait for the first. Thread-safe.

    Failures are not kept: each caller that waited makes the value itself, so that no two share an exception.
    """

    def __init__(self, bound: int) -> None:
        """`bound`: of the number of values."""
        self._values: LruCache[K, V] = LruCache(bound)
        self._under_way: dict[K, threading.Event] = {}
        self._lock = threading.Lock()  # never held while a value is made

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: K, make: Callable[[], V]) -> V:
        """Return the value, after `make` where there is none. Raise what `make` raises."""
        while True:
            with self._lock:
                if key in self._values:
                    return self._values[key]
                done = self._under_way.get(key)
                if done is None:
                    self._under_way[key] = threading.Event()
            if done is None:
                return self._make(key, make)
            done.wait()

    def _make(self, key: K, make: Callable[[], V]) -> V:
        try:
            value = make()
            self.put(key, value)
            return value
        finally:
            with self._lock:
                self._under_way.pop(key).set()

    def put(self, key: K, value: V) -> None:
        """Keep a value that is known."""
        with self._lock:
            self._values.put(key, value)

    def forget(self, key: K, value: V) -> None:
        """Drop this very value; one that was made since stays."""
        with self._lock:
            if self._values.get(key) is value:
                self._values.pop(key)
