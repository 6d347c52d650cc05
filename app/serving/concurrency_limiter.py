"""Room for sequences: a request that would exceed it is refused at once, before anything is tokenized."""

import contextlib
from collections.abc import Iterator

from app.errors import InvalidRequest, Overloaded


class ConcurrencyLimiter:
    """Counts sequences from before their admission to their end. Belongs to one event loop."""

    def __init__(self, bound: int) -> None:
        """`bound`: as many as the engine runs and lets wait, so that it never refuses one that holds room."""
        self.bound = bound
        self.taken = 0  # sequences that hold room now

    def check(self) -> None:
        """Raise Overloaded where there is no room for a single one."""
        if self.taken >= self.bound:
            raise Overloaded(f"{self.bound} answers are under way or waiting already; try again shortly.")

    @contextlib.contextmanager
    def hold(self, count: int, beside: int = 0) -> Iterator[None]:
        """Hold room for `count` sequences of one call: all or none. Raise Overloaded, InvalidRequest.

        `beside`: how many the call holds already, so that one that will never have room isn't sent again.
        """
        if beside + count > self.bound:
            raise InvalidRequest(
                f"{beside + count} answers at once are more than this server's {self.bound}; ask for fewer."
            )
        if self.taken + count > self.bound:
            raise Overloaded(
                f"{self.taken} of {self.bound} answers are under way or waiting, and this request needs "
                f"{count}; try again shortly."
            )
        self.taken += count
        try:
            yield
        finally:
            self.taken -= count
