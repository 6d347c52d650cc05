"""Prompt lookup: what may come next is what followed the same tokens before, in a request's own text.

After "Prompt Lookup Decoding" (Saxena 2023). It costs no model, and is right where an answer copies: quotes,
extracted fields, edited code, repetitions.
"""

import sys
from collections.abc import Iterable, Sequence

_SIZES = (3, 2)  # tokens that have to be the same, the longer first
_AT_FIRST = 0.5  # the chance of a guess to be right, before anything is known
_RATE = 1 / 8  # weight of one more guess in the chance
_RECOVERY = 1 / 64  # of what the chance lost, for each look without a guess


class Lookup:
    """The text of one sequence, and how often guesses from it were right.

    Ids are kept as the characters of a string: four bytes each, and a search costs next to nothing.
    """

    def __init__(self, before: Iterable[int]) -> None:
        """`before` are the ids that the sequence stands on or reads."""
        self._text = _as_text(before)
        self._num_own = 0
        self._chance = _AT_FIRST

    def guess(self, own: Sequence[int], most: int, least_chance: float) -> tuple[int, ...]:
        """Return up to `most` ids that may follow the `own` ones, which have grown since the last call.

        As many are guessed as are right, all of them, with `least_chance`.
        """
        self._text += _as_text(own[self._num_own :])
        self._num_own = len(own)
        count, chance = 0, self._chance
        while count < most and chance >= least_chance:
            count, chance = count + 1, chance * self._chance
        if not count:
            self._chance = max(self._chance, self._chance + (_AT_FIRST - self._chance) * _RECOVERY)
            return ()
        return self._following(count)

    def learn(self, num_right: int, num_guessed: int) -> None:
        """Take in how many of the last guesses were right; of the wrong ones only the first says anything."""
        for _ in range(num_right):
            self._chance += (1 - self._chance) * _RATE
        if num_right < num_guessed:
            self._chance -= self._chance * _RATE

    def _following(self, count: int) -> tuple[int, ...]:
        """Return `count` ids that followed the text's last ones where these came last; none: they are new."""
        text = self._text
        for size in _SIZES:
            begin = text.rfind(text[-size:], 0, -1)
            if begin >= 0:
                period = text[begin + size :]  # at its end the text would go on from the guess itself
                found = period * (count // len(period) + 1)
                return tuple(map(ord, found[:count]))
        return ()


def _as_text(ids: Iterable[int]) -> str:
    """Return a character for each id; no vocabulary is known with more ids than there are characters."""
    return "".join([chr(id_ % sys.maxunicode) for id_ in ids])
