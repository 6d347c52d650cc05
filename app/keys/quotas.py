"""Requests and tokens per minute of each key: buckets in the memory of this process.

Replicas don't share them: behind a load balancer a key has its quota on each.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from app.errors import RateLimited
from app.keys.key import Key

_MINUTE = 60.0
_ROUNDING = 1e-6


@dataclass(slots=True)
class _Bucket:
    """A leaky bucket: it leaks at the quota's rate, and a minute's quota may be used at once."""

    used: float = 0.0
    at: float = 0.0  # when `used` was right

    def wait(self, per_minute: int, now: float) -> float:
        """Return the seconds until there is room for one more; 0: there is."""
        rate = per_minute / _MINUTE
        self.used = max(0.0, self.used - (now - self.at) * rate)
        self.at = now
        excess = self.used + 1 - per_minute
        return excess / rate if excess > _ROUNDING else 0.0


@dataclass(slots=True)
class _Use:
    requests: _Bucket = field(default_factory=_Bucket)
    tokens: _Bucket = field(default_factory=_Bucket)


class Quotas:
    """The use of each configured key. For one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds that never go back."""
        self._clock = clock
        self._uses: dict[str, _Use] = {}

    def keep(self, names: Iterable[str]) -> None:
        """Forget all keys but these; a key that stays keeps its use, also under a new quota."""
        kept = set(names)
        self._uses = {name: use for name, use in self._uses.items() if name in kept}

    def take(self, key: Key, *, needs_tokens: bool) -> None:
        """Count a request. Raises RateLimited, and counts nothing, where the key must wait.

        Only a request that `needs_tokens` waits for them.
        """
        self._check(key, requests=True, tokens=needs_tokens)
        if key.requests_per_minute is not None:
            self._use(key).requests.used += 1

    def check_tokens(self, key: Key) -> None:
        """Raise RateLimited if the key has used more tokens than its quota allows."""
        self._check(key, requests=False, tokens=True)

    def _check(self, key: Key, *, requests: bool, tokens: bool) -> None:
        use, now = self._use(key), self._clock()
        waits = {}
        if requests and key.requests_per_minute is not None:
            waits[f"{key.requests_per_minute} requests"] = use.requests.wait(key.requests_per_minute, now)
        if tokens and key.tokens_per_minute is not None:
            waits[f"{key.tokens_per_minute} tokens"] = use.tokens.wait(key.tokens_per_minute, now)
        quota, seconds = max(waits.items(), key=lambda item: item[1], default=("", 0.0))
        if seconds > 0:
            raise RateLimited(
                f"This key has used up its {quota} a minute; try again after the seconds in Retry-After.",
                retry_after=seconds,
            )

    def _use(self, key: Key) -> _Use:
        return self._uses.setdefault(key.name, _Use())

    def charge(self, key: Key, num_tokens: int) -> None:
        """Count the tokens of an answer that has ended; this may exceed the quota."""
        if key.tokens_per_minute is None:
            return
        bucket = self._use(key).tokens
        bucket.wait(key.tokens_per_minute, self._clock())  # what has leaked so far, before more comes in
        bucket.used += num_tokens
