"""Room for sequences: a request that would exceed it is refused at once, before anything is tokenized."""

import contextlib
from collections.abc import Iterator

from app.errors import InvalidRequest, Overloaded


class ConcurrencyLimiter:
    """Counts sequences from before their admission to their end. Belongs to one event loop."""

    def __init__(self, bound: int) -> None:
        """`bound`: as many as the engine runs and lets wait, so that it never refuses one that holds room."""
        self.bound = bound
        self._taken = 0

    @property
    def taken(self) -> int:
        """Return how many hold room now."""
        return self._taken

    def check(self) -> None:
        """Raise Overloaded where there is no room for a single one."""
        if self._taken >= self.bound:
            raise Overloaded(f"{self.bound} answers are under way or waiting already; try again shortly.")

    @contextlib.contextmanager
    def hold(self, count: int) -> Iterator[None]:
        """Hold room for `count` sequences of one request: all or none. Raise Overloaded, InvalidRequest."""
        if count > self.bound:
            raise InvalidRequest(
                f"{count} answers at once are more than this server's {self.bound}; ask for fewer."
            )
        if self._taken + count > self.bound:
            raise Overloaded(
                f"{self._taken} of {self.bound} answers are under way or waiting, and this request needs "
                f"{count}; try again shortly."
            )
        self._taken += count
        try:
            yield
        finally:
            self._taken -= count
