"""Text with steps, a marker and an answer behind it: split as it comes, the marker found across tokens."""

from collections.abc import Sequence
from typing import NamedTuple

from app.text.stop_strings import StopStringMatcher


class Piece(NamedTuple):
    """Text that may be shown at once: nothing of it can belong to the marker or to a stop string."""

    text: str
    is_reasoning: bool  # it comes before the marker
    step: str | None = None  # that ends with the piece, without its end and white space around it


class MarkedText:
    """Splits one text. The answer has no white space at its beginning; stop strings end the answer only."""

    def __init__(
        self,
        marker: str | None,
        step_end: str | None = None,
        stops: Sequence[str] = (),
        *,
        shows_stop: bool = False,
    ) -> None:
        """`marker`: None where there is none; `step_end`: None where all before the marker is one step.

        `shows_stop`: the stop string that ends the answer is a part of it.
        """
        self._marker = StopStringMatcher([] if marker is None else [marker])
        self._step_end = step_end
        self._step = ""  # that has begun
        self._stops = StopStringMatcher(stops, is_shown=shows_stop)
        self._shown: list[Piece] = []
        self._has_begun = False  # the answer
        self.is_found = False  # the marker

    @property
    def is_stopped(self) -> bool:
        """Return whether a stop string ended the answer; nothing more may be pushed."""
        return self._stops.stopped is not None

    @property
    def reasoning(self) -> str:
        """Return what comes before the marker, as far as it may be shown."""
        return "".join(piece.text for piece in self._shown if piece.is_reasoning)

    @property
    def steps(self) -> tuple[str, ...]:
        """Return the steps that have ended."""
        return tuple(piece.step for piece in self._shown if piece.step is not None)

    @property
    def answer(self) -> str:
        """Return what comes after the marker, as far as it may be shown."""
        return "".join(piece.text for piece in self._shown if not piece.is_reasoning)

    @property
    def rest(self) -> str:
        """Return what came with the marker's last character and stands behind it."""
        return self._marker.rest

    def push(self, text: str) -> list[Piece]:
        """Take more text before the marker. Once it is found, `rest` is the beginning of what follows."""
        pieces = self._stepped(self._marker.push(text))
        return self._note(pieces) if self._marker.stopped is None else self._marked(pieces)

    def push_answer(self, text: str, *, may_stop: bool = True) -> list[Piece]:
        """Take more text after the marker. Stop strings that are complete too early are text."""
        if not self._has_begun:
            text = text.lstrip()
            self._has_begun = bool(text)
        return self._answered(self._stops.push(text, may_stop=may_stop))

    def mark(self) -> list[Piece]:
        """Let what comes next be the answer, though there was no marker; return what was held back."""
        return self._marked(self._stepped(self._marker.flush()))

    def flush(self) -> list[Piece]:
        """End the text; return what was held back."""
        if self.is_found:
            return self._answered(self._stops.flush())
        return self._note(self._with_last_step(self._stepped(self._marker.flush())))

    def _marked(self, pieces: list[Piece]) -> list[Piece]:
        self.is_found = True
        return self._note(self._with_last_step(pieces))

    def _stepped(self, text: str) -> list[Piece]:
        """Split text before the marker where steps end."""
        pieces, end = [], self._step_end
        while end is not None and (length := _length_to(end, self._step, text)):
            self._step += text[:length]
            step = self._step.removesuffix(end).strip()
            pieces.append(Piece(text[:length], is_reasoning=True, step=step or None))
            self._step, text = "", text[length:]
        self._step += text
        return [*pieces, Piece(text, is_reasoning=True)] if text else pieces

    def _with_last_step(self, pieces: list[Piece]) -> list[Piece]:
        """Let the step that has begun end with the last piece."""
        step, self._step = self._step.strip(), ""
        if not step:
            return pieces
        *others, last = pieces or [Piece("", is_reasoning=True)]
        # A piece that ends a step already leaves nothing begun behind it.
        return [*others, last._replace(step=step)]

    def _answered(self, text: str) -> list[Piece]:
        return self._note([Piece(text, is_reasoning=False)] if text else [])

    def _note(self, pieces: list[Piece]) -> list[Piece]:
        self._shown += pieces
        return pieces


def _length_to(end: str, before: str, text: str) -> int:
    """Return how much of `text` there is up to the first `end` in `before` and `text` joined; 0: none.

    There is none in `before` alone.
    """
    known = before[max(0, len(before) - len(end) + 1) :]
    found = (known + text).find(end)
    return 0 if found < 0 else found + len(end) - len(known)
