"""Text that remembers which of its characters a template itself wrote.

Operations that a TrackedText knows keep that memory; what comes out of any other one is a plain str,
which counts as text of others from end to end. So nothing can make a foreign character the template's.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self, SupportsIndex

_OWN = 1
_PERCENT = re.compile("%[a-z]")
_BRACES = re.compile(r"\{(\w*)\}", re.ASCII)
_RUNS = re.compile(rb"\x00+|\x01+")


class TrackedText(str):
    """A str with a mark for each character: the template's own, or foreign, which is the default.

    Each method does what str's does, and keeps the marks.
    """

    _own: bytes  # a byte for each character; the sandbox hides names that begin so

    def __new__(cls, text: object = "", own: bytes | None = None) -> Self:
        """`own` holds a byte for each character of `text`."""
        self = super().__new__(cls, text)
        self._own = bytes(len(self)) if own is None else own
        return self

    def __str__(self) -> str:
        return self

    def __add__(self, other: str) -> str:
        return TrackedText(super().__add__(other), self._own + _marks(other))

    def __radd__(self, other: str) -> str:
        return TrackedText(str.__add__(other, self), _marks(other) + self._own)

    def __mul__(self, count: SupportsIndex) -> str:
        return TrackedText(super().__mul__(count), self._own * count)

    __rmul__ = __mul__

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        own = self._own[key if isinstance(key, slice) else slice(*_place(key, len(self)))]
        return TrackedText(super().__getitem__(key), own)

    def __iter__(self) -> Iterator[str]:
        return (self[place] for place in range(len(self)))

    def join(self, parts: Iterable[str], /) -> str:
        pieces: list[str] = []
        for part in parts:
            pieces += (self, part) if pieces else (part,)
        return concatenated(pieces)

    def strip(self, characters: str | None = None, /) -> str:
        text = super().strip(characters)
        begin = len(self) - len(super().lstrip(characters)) if text else 0
        return self[begin : begin + len(text)]

    def lstrip(self, characters: str | None = None, /) -> str:
        return self[len(self) - len(super().lstrip(characters)) :]

    def rstrip(self, characters: str | None = None, /) -> str:
        return self[: len(super().rstrip(characters))]

    def removeprefix(self, prefix: str, /) -> str:
        return self[len(self) - len(super().removeprefix(prefix)) :]

    def removesuffix(self, suffix: str, /) -> str:
        return self[: len(super().removesuffix(suffix))]

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._found(super().split(sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._found(super().rsplit(sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list[str]:
        lines, begin = [], 0
        for whole, line in zip(super().splitlines(True), super().splitlines(keepends), strict=True):
            lines.append(self[begin : begin + len(line)])
            begin += len(whole)
        return lines

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        before, found, _ = super().partition(sep)
        return self._cut(len(before), len(found))

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        before, found, _ = super().rpartition(sep)
        return self._cut(len(before), len(found))

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:
        if not old:
            return TrackedText(super().replace(old, new, count))
        return _tracked(new).join(self.split(old, count))

    def upper(self) -> str:
        return self._mapped(str.upper, is_by_character=True)

    def lower(self) -> str:
        return self._mapped(str.lower, is_by_character=True)

    def title(self) -> str:
        return self._mapped(str.title)

    def capitalize(self) -> str:
        return self._mapped(str.capitalize)

    def __mod__(self, values: Any) -> str:
        """Keep the marks where every place is plain, as in %s."""
        given = values if isinstance(values, tuple) else (values,)
        places = list(_PERCENT.finditer(self))
        text = super().__mod__(values)
        if len(places) != len(given) or self.count("%") != len(places):
            return text
        return _filled(
            self,
            [
                (place, value if isinstance(value, str) else place[0] % (value,))
                for place, value in zip(places, given, strict=True)
            ],
            text,
        )

    def stretches(self) -> list[tuple[str, bool]]:
        """Return neighbouring characters of the same origin, and whether they are the template's own."""
        whole = str.__str__(self)
        return [(whole[run.start() : run.end()], run[0][0] == _OWN) for run in _RUNS.finditer(self._own)]

    def _cut(self, begin: int, size: int) -> tuple[str, str, str]:
        return self[:begin], self[begin : begin + size], self[begin + size :]

    def _found(self, parts: list[str], sep: str | None) -> list[str]:
        """Return the parts of a split, marked. Only white space is between those of a bare split."""
        found, begin = [], 0
        for part in parts:
            begin = self.find(part, begin) if sep is None else begin
            found.append(self[begin : begin + len(part)])
            begin += len(part) + len(sep or "")
        return found

    def _mapped(self, change: Callable[[str], str], *, is_by_character: bool = False) -> str:
        """Change characters: one may become several, but never none, so texts of the same length correspond.

        `is_by_character`: how many it becomes never depends on its neighbours.
        """
        text = change(self)
        if len(text) == len(self):
            return TrackedText(text, self._own)
        if not is_by_character:
            return text
        sizes = (len(change(character)) for character in str.__iter__(self))
        return TrackedText(text, b"".join(self._own[i : i + 1] * size for i, size in enumerate(sizes)))


def own_text(text: str) -> TrackedText:
    """Return text of the template's own."""
    return TrackedText(text, bytes([_OWN]) * len(text))


def concatenated(parts: Iterable[str]) -> TrackedText:
    """Return all parts in a row; each character keeps its mark."""
    pieces = list(parts)
    return TrackedText("".join(pieces), b"".join(map(_marks, pieces)))


def formatted(template: str, values: Sequence[Any], named: Mapping[str, Any], text: str) -> str:
    """Return `text`, made by `template.format`; with marks where every place is plain, as in {a}."""
    if "{{" in template or "}}" in template:
        return text
    pairs, number = [], 0
    for place in _BRACES.finditer(template):
        key = place[1] or str(number)
        number += not place[1]
        index = int(key) if key.isdigit() else None
        pairs.append((place, str(named.get(key, "") if index is None else values[index])))
    return _filled(_tracked(template), pairs, text)


def _filled(template: TrackedText, pairs: Sequence[tuple[re.Match[str], str]], text: str) -> str:
    """Return the values in their places, if that is the text."""
    pieces, begin = [], 0
    for place, value in pairs:
        pieces += [template[begin : place.start()], value]
        begin = place.end()
    result = concatenated([*pieces, template[begin:]])
    return result if result == text else text


def _tracked(text: str) -> TrackedText:
    return text if isinstance(text, TrackedText) else TrackedText(text)


def _marks(text: str) -> bytes:
    return text._own if isinstance(text, TrackedText) else bytes(len(text))


def _place(index: SupportsIndex, size: int) -> tuple[int, int]:
    position = index.__index__() % max(size, 1)
    return position, position + 1
