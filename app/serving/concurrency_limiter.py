"""Room for generations: whoever would exceed it is refused at once, before anything is tokenized."""

import contextlib
from collections.abc import Iterator

from app.errors import InvalidRequest, Overloaded


class ConcurrencyLimiter:
    """Counts answers from before their admission to their end. Belongs to one event loop."""

    def __init__(self, bound: int) -> None:
        """`bound`: as many as the engine runs and lets wait, so that it has room for all who hold one."""
        self.bound = bound
        self._taken = 0

    @property
    def taken(self) -> int:
        """ConcurrencyLimiter that are held now."""
        return self._taken

    def check(self) -> None:
        """Whether there is any place; costs nothing. Raises Overloaded."""
        if self._taken >= self.bound:
            raise Overloaded(f"{self.bound} answers are under way or waiting already; try again shortly.")

    @contextlib.contextmanager
    def hold(self, count: int) -> Iterator[None]:
        """Hold places for `count` answers of one request: all or none. Raises Overloaded, InvalidRequest."""
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
