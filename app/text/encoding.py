"""Long texts to tokens: in stretches of bounded size, in compact arrays, without holding up other threads.

A text is cut before white space that follows a word, where the tokenizer gives the same ids for both sides
together and apart. A text that has no such place in MAX_STRETCH characters is refused.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from app.errors import RequestTooLong

STRETCH = 16_384  # characters that are tokenized at once; each takes up to 500 bytes meanwhile
MAX_STRETCH = 16 * STRETCH  # where no word ends

_BORDER = re.compile(r"(?<=\w)(?=[ \n])")
_AROUND = 64  # characters on each side that are tokenized to see whether a border is one
_MAX_TRIED = 8


@dataclass(frozen=True, slots=True)
class Tokens:
    """A row of tokens. All arrays are int32 [T]; begins and ends count characters of the whole text."""

    ids: NDArray[np.int32]
    begins: NDArray[np.int32]  # equal to the end for what the post-processor added
    ends: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.ids)

    def moved(self, offset: int) -> "Tokens":
        """Return the same tokens of a text that begins at `offset` of another one."""
        return Tokens(self.ids, self.begins + offset, self.ends + offset)


def row(ids: Sequence[int], spans: Sequence[tuple[int, int]] | None = None) -> Tokens:
    """Return the tokens of ids; without spans they stand for nothing of the text."""
    pairs = np.array(spans if spans else [(0, 0)] * len(ids), dtype=np.int32).reshape(-1, 2)
    return Tokens(np.array(ids, dtype=np.int32), pairs[:, 0], pairs[:, 1])


def chained(rows: Sequence[Tokens]) -> Tokens:
    """Return all rows as one."""
    if len(rows) == 1:
        return rows[0]
    return Tokens(
        np.concatenate([each.ids for each in rows] or [_NONE]),
        np.concatenate([each.begins for each in rows] or [_NONE]),
        np.concatenate([each.ends for each in rows] or [_NONE]),
    )


_NONE = np.zeros(0, dtype=np.int32)


class Encoder:
    """One backend tokenizer for texts of any length, without what its post-processor adds."""

    def __init__(self, first: Tokenizer, further: Tokenizer, stretch: int) -> None:
        """`further` is for text that continues other text; `stretch` counts characters."""
        self._first = first
        self._further = further
        self._stretch = stretch

    def tokens(self, text: str, *, is_continued: bool = False, limit: int | None = None) -> Tokens:
        """Return all tokens of a text. Raise RequestTooLong where they are surely more than `limit`."""
        rows, total = [], 0
        for begin, end in self._stretches(text):
            if limit is not None and total > limit:
                raise RequestTooLong(
                    f"The text has more tokens than the base's {limit} positions; shorten it, or set "
                    "parameters.truncate.",
                    param="inputs",
                )
            backend = self._further if is_continued or begin else self._first
            rows.append(_encode(backend, text[begin:end]).moved(begin))
            total += len(rows[-1])
        return chained(rows)

    def beginning(self, text: str, count: int) -> tuple[int, int]:
        """Return where the first part with at least `count` tokens ends, and how many it has."""
        end = total = 0
        for begin, end in self._stretches(text):
            total += len(_encode(self._further, text[begin:end]))
            if total >= count:
                break
        return end, total

    def ending(self, text: str, count: int) -> tuple[int, int]:
        """Return where the last part with at least `count` tokens begins (0: all), and how many it has."""
        begin, total = len(text), 0
        while begin and total < count:
            end, begin = begin, self._border_before(text, begin)
            total += len(_encode(self._further, text[begin:end]))
        return begin, total

    def _border_before(self, text: str, end: int) -> int:
        begin = end - self._stretch
        while begin > 0:
            border = self._border(text, begin, min(begin + self._stretch // 2, end - 1))
            if border is not None:
                return border
            begin -= self._stretch // 2
            self._check_stretch(end - begin)
        return 0

    def _stretches(self, text: str) -> Iterator[tuple[int, int]]:
        begin = 0
        while begin < len(text):
            end = self._border_after(text, begin)
            yield begin, end
            begin = end

    def _border_after(self, text: str, begin: int) -> int:
        end = begin + self._stretch
        while end < len(text):
            border = self._border(text, end - self._stretch // 2, end)
            if border is not None:
                return border
            end += self._stretch // 2
            self._check_stretch(end - begin)
        return len(text)

    def _check_stretch(self, size: int) -> None:
        if size > MAX_STRETCH:
            raise RequestTooLong(
                f"The text has {MAX_STRETCH} characters without white space after a word, which is too much "
                "to tokenize at once; send less.",
                param="inputs",
            )

    def _border(self, text: str, begin: int, end: int) -> int | None:
        """Return a place from `begin` to `end` where the text can be cut, if a few tries find one."""
        for tried, match in enumerate(_BORDER.finditer(text, max(begin, 1), end)):
            if self._is_border(text, match.start()):
                return match.start()
            if tried >= _MAX_TRIED:
                break
        return None

    def _is_border(self, text: str, place: int) -> bool:
        begin, end = max(0, place - _AROUND), place + _AROUND
        both, left, right = (
            _encoding(self._further, side).ids
            for side in (text[begin:end], text[begin:place], text[place:end])
        )
        return bool(both == left + right)


def _encode(backend: Tokenizer, text: str) -> Tokens:
    encoding = _encoding(backend, text)
    return row(encoding.ids, encoding.offsets)


def _encoding(backend: Tokenizer, text: str) -> Encoding:
    """Encode as a batch, the only way that lets other threads run meanwhile."""
    return backend.encode_batch([text], add_special_tokens=False)[0]
