"""Token masks of grammars, worked out a step ahead of their rows and off the engine's thread.

The engine knows nothing of grammars. When a constrained row gets a token, a worker consumes it and works out
which tokens may follow, while the engine goes on to the next forward pass. The engine waits for the mask only
when it chooses the row's next token, and not for long: a row with a late mask is tried again with the next
step. V is the vocabulary.
"""

import logging
import os
import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Executor, Future
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from app.errors import ConstraintFailed, PromptplexError

PackedMask = NDArray[np.uint32]  # [ceil(V / 32)]; bit i % 32 of word i // 32: token i may come next

NUM_WORKERS = min(4, os.cpu_count() or 1)  # a mask takes far less than a forward pass
# Of all masks of a step together.
MASK_SECONDS = 0.02

_Row = TypeVar("_Row", bound=Hashable)
_log = logging.getLogger("promptplex.engine")


class TokenConstraint(Protocol):
    """One row's state in its grammar. Used by one thread at a time."""

    def mask(self) -> PackedMask:
        """Return the tokens that may come next: only ids that end the row, once the grammar is complete."""
        ...

    def accept(self, token_id: int) -> None:
        """Go on with a token that the mask allowed."""
        ...


class GrammarSource(Protocol):
    """A source of constraints; wired in `app/main.py`. Called from several threads."""

    def start(self, grammar: str) -> TokenConstraint:
        """Return a constraint at the grammar's beginning."""
        ...


class AsyncTokenMask:
    """The constraint of one row. At most one piece of work is under way, and the engine drives it."""

    def __init__(self, source: GrammarSource, grammar: str, workers: Executor) -> None:
        self._source = source
        self._grammar = grammar
        self._workers = workers
        self._constraint: TokenConstraint | None = None
        self._next: Future[PackedMask] | None = None

    def begin(self) -> None:
        """Work out the first mask. A row that comes back from a preemption goes on where it was."""
        if self._next is None:
            self._submit(self._start)

    def accept(self, token_id: int) -> None:
        """Go on with the row's new token, after the last mask was taken."""
        self._submit(lambda: self._advance(token_id))

    def mask(self, seconds: float) -> PackedMask | None:
        """Wait up to `seconds` for the mask of the next token, and return it; None: it is late.

        Raise ConstraintFailed where the row can't go on. An error in a grammar, a panic of native code
        included, ends its own row alone.
        """
        assert self._next is not None, "a row begins before it gets a token"
        try:
            error = self._next.exception(seconds)
        except TimeoutError:
            return None
        if error is None:
            return self._next.result()
        if isinstance(error, ConstraintFailed):
            raise error
        _log.error("a grammar failed unexpectedly", exc_info=error)
        raise ConstraintFailed(
            "the grammar of this request can't be followed any further; simplify the schema or regex, or "
            "give it tighter bounds"
        )

    def drop(self) -> None:
        """Give up work that has not begun; the row has ended."""
        if self._next is not None:
            self._next.cancel()

    def _submit(self, work: Callable[[], PackedMask]) -> None:
        self._next = self._workers.submit(work)

    def _start(self) -> PackedMask:
        self._constraint = self._source.start(self._grammar)
        return self._constraint.mask()

    def _advance(self, token_id: int) -> PackedMask:
        assert self._constraint is not None
        self._constraint.accept(token_id)
        return self._constraint.mask()


def collect_masks(
    rows: Mapping[_Row, AsyncTokenMask],
) -> tuple[dict[_Row, PackedMask], dict[_Row, PromptplexError]]:
    """Wait up to `MASK_SECONDS`; return the masks that are known, and the errors of rows that can't go on.

    A row that is in neither is late.
    """
    masks: dict[_Row, PackedMask] = {}
    failures: dict[_Row, PromptplexError] = {}
    end = time.monotonic() + MASK_SECONDS
    for row, constraint in rows.items():
        try:
            mask = constraint.mask(max(0.0, end - time.monotonic()))
        except PromptplexError as error:
            failures[row] = error
        else:
            if mask is not None:
                masks[row] = mask
    return masks, failures
