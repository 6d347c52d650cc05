"""Ctrl-C and SIGTERM: a run ends after its step, with a checkpoint; a second signal ends it at once."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Whether the run is to end soon. Signals outside `deferred` raise KeyboardInterrupt."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.is_wanted = False
        self._is_deferred = False
        self._say = say

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Handle the signals in the block, in the main thread."""
        before = [signal.signal(number, self._on_signal) for number in _SIGNALS]
        try:
            yield
        finally:
            for number, handler in zip(_SIGNALS, before, strict=True):
                signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Let the block end by itself, soon after the first signal; then raise KeyboardInterrupt."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False
        if self.is_wanted:
            raise KeyboardInterrupt

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self._is_deferred or self.is_wanted:
            raise KeyboardInterrupt
        self.is_wanted = True
        self._say("ending after this step, with a checkpoint; press Ctrl-C again to end at once")
