"""Truncation: the values of rendered pieces, cut to a number of tokens, as a tokenizer's side says.

On the left, values lose their beginning, and what is left of them has so many tokens: a decoder goes on from
the end. On the right they lose their end, and the whole text has so many tokens, as in encoders' sources.
"""

from enum import StrEnum
from itertools import count

import numpy as np
from numpy.typing import NDArray

from app.text.encoding import Tokens
from app.text.guarded_encoder import GuardedEncoder, Values, value_spans
from app.text.template import Piece

_MARGIN = 4  # tokens that can differ where a value begins and ends


class TruncationSide(StrEnum):
    """Which end of the values goes, by the names that tokenizers have for it."""

    LEFT = "left"
    RIGHT = "right"


def truncated(
    encoder: GuardedEncoder, pieces: tuple[Piece, ...], keep: int, limit: int | None, side: TruncationSide
) -> tuple[Piece, ...]:
    """Return the pieces with the last `keep` tokens of their values' text, or the first `keep` of all.

    The values' text is cut at a token's border and tokenized again, so that the model always sees a whole,
    natural tokenization of a rendered template. On the right, a template with more tokens than `keep` loses
    none of its own. Raise as `GuardedEncoder.tokens`.
    """
    cut = _without_beginning if side is TruncationSide.LEFT else _without_end
    return cut(encoder, pieces, keep, limit)


def _without_beginning(
    encoder: GuardedEncoder, pieces: tuple[Piece, ...], keep: int, limit: int | None
) -> tuple[Piece, ...]:
    if limit is not None and keep <= limit:
        pieces, limit = _shortened(encoder, pieces, keep), None  # what is cut off needn't fit
    target = keep
    for attempt in count():
        tokens = encoder.tokens(pieces, limit)
        own = _of_values(tokens, pieces)
        if len(own) <= keep:
            break
        pieces = _without(pieces, _cut(tokens.ends[own], pieces, target))
        # What is left can split into more tokens than before; the cut then grows until it fits.
        target = max(keep - (1 << attempt) // 8, 0)
    return pieces


def _without_end(
    encoder: GuardedEncoder, pieces: tuple[Piece, ...], keep: int, limit: int | None
) -> tuple[Piece, ...]:
    if limit is not None and keep <= limit:
        pieces, limit = _beginnings(encoder, pieces, keep), None
    excess = len(encoder.tokens(pieces, limit)) - keep
    if excess <= 0:
        return pieces
    ends = _token_ends(encoder, pieces, keep)
    left, kept = len(ends), pieces
    for attempt in count():
        kept = _until(pieces, ends[left - 1] if left else 0)
        excess = len(encoder.tokens(kept)) - keep
        if excess <= 0 or not left:
            break
        left = max(left - excess - (1 << attempt) // 8, 0)
    return kept


def _token_ends(encoder: GuardedEncoder, pieces: tuple[Piece, ...], number: int) -> list[int]:
    """Return where the first tokens of the values' text end in the rendered text, each value by itself."""
    found: list[int] = []
    for piece, (begin, _) in zip(
        (piece for piece in pieces if piece.field is not None), value_spans(pieces), strict=True
    ):
        ends = encoder.literal.tokens(piece.text, is_continued=begin > 0).ends
        found += [begin + int(end) for end in ends[: number - len(found)]]
    return found


def _beginnings(encoder: GuardedEncoder, pieces: tuple[Piece, ...], keep: int) -> tuple[Piece, ...]:
    """Drop what truncation on the right surely drops of long values."""
    values = [piece for piece in pieces if piece.field is not None]
    if sum(len(piece.text) for piece in values) <= encoder.stretch:
        return pieces
    left = keep + _MARGIN * (len(values) + 2)
    kept: list[Piece] = []
    for piece in pieces:
        if piece.field is not None:
            end, number = encoder.literal.beginning(piece.text, left) if left else (0, 0)
            piece, left = Piece(piece.text[:end], piece.field), max(left - number, 0)
        kept.append(piece)
    return tuple(kept)


def _shortened(encoder: GuardedEncoder, pieces: tuple[Piece, ...], keep: int) -> tuple[Piece, ...]:
    """Drop what truncation surely drops of long values, and so needn't be tokenized with the rest."""
    values = [piece for piece in pieces if piece.field is not None]
    if sum(len(piece.text) for piece in values) <= encoder.stretch:
        return pieces
    left = keep + _MARGIN * (len(values) + 2)
    kept: list[Piece] = []
    for piece in reversed(pieces):
        if piece.field is not None:
            begin, number = encoder.literal.ending(piece.text, left)
            piece, left = Piece(piece.text[begin:], piece.field), max(left - number, 0)
        kept.append(piece)
    return tuple(reversed(kept))


def _of_values(tokens: Tokens, pieces: tuple[Piece, ...]) -> NDArray[np.intp]:
    """Return which tokens stand for some of the values' text, in whole or in part."""
    # Some tokenizers leave white space out of a span; it belongs to the token after it.
    covered = np.concatenate([[0], np.maximum.accumulate(tokens.ends)])[:-1]
    return np.flatnonzero(Values(pieces).fill(np.minimum(tokens.begins, covered), tokens.ends))


def _cut(ends: NDArray[np.int32], pieces: tuple[Piece, ...], keep: int) -> int:
    """Return up to which character of the rendered text the values must go to leave `keep` tokens.

    `ends`: of the values' tokens, int32 [T].
    """
    first = next(begin for begin, end in value_spans(pieces) if begin < end)
    # The end of the last dropped token rather than the start of the first kept one, which may
    # leave out the space before it. At least one character goes, so that this ends.
    return max(int(ends[len(ends) - keep - 1]), first + 1)


def _until(pieces: tuple[Piece, ...], cut: int) -> tuple[Piece, ...]:
    """Return the pieces without the values' text from character `cut` on."""
    kept = []
    position = 0
    for piece in pieces:
        left = max(cut - position, 0) if piece.field is not None else len(piece.text)
        kept.append(Piece(piece.text[:left], piece.field))
        position += len(piece.text)
    return tuple(kept)


def _without(pieces: tuple[Piece, ...], cut: int) -> tuple[Piece, ...]:
    """Return the pieces without the values' text before character `cut`."""
    kept = []
    position = 0
    for piece in pieces:
        gone = min(max(cut - position, 0), len(piece.text)) if piece.field is not None else 0
        kept.append(Piece(piece.text[gone:], piece.field))
        position += len(piece.text)
    return tuple(kept)
