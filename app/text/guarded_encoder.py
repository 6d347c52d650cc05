"""Rendered pieces to tokens, none of which is a special token that a value's text spells."""

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from app.errors import InvalidRequest
from app.text.encoding import Encoder, Tokens, chained, row
from app.text.template import Piece, joined


class GuardedEncoder:
    """Tokenizes pieces as one text. Special tokens count where the template writes them, and nowhere else.

    Safe to use from many threads: its backends never change.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, control: frozenset[str], stretch: int) -> None:
        """`control` are added tokens that count as special though they aren't flagged so.

        `stretch`: characters that are tokenized at once.
        """
        source = _flagged(tokenizer.backend_tokenizer.to_str(), control)
        continued = _without_first_prefix(source)
        self.backend = Tokenizer.from_str(source)
        self._plain = Encoder(_backend(source), _backend(continued), stretch)
        # Special tokens in the text are ordinary characters.
        self.literal = Encoder(
            _backend(source, is_literal=True), _backend(continued, is_literal=True), stretch
        )
        self._special = {
            id_: token for id_, token in self.backend.get_added_tokens_decoder().items() if token.special
        }
        self._spellings = {token.content for token in self._special.values()}
        self._special_array = np.array(sorted(self._special), dtype=np.int32)
        self.stretch = stretch
        self._unknown_id: int | None = tokenizer.unk_token_id
        self.special_ids = frozenset(self._special)  # ids that no value's text becomes

    def tokens(self, pieces: tuple[Piece, ...], limit: int | None = None) -> Tokens:
        """Return the tokens of the whole text, without what the post-processor adds.

        Raise RequestTooLong: a long text surely has more than `limit` tokens; shorter ones aren't counted.
        Raise InvalidRequest: a value holds what can only be written as a special token.
        """
        text = joined(pieces)
        tokens = self._plain.tokens(text, limit=limit)
        if self._is_forged(tokens, text, pieces):
            tokens = self.tokens_apart(pieces, limit)
        return tokens

    def _is_forged(self, tokens: Tokens, text: str, pieces: tuple[Piece, ...]) -> bool:
        """Return whether any special token comes from a value's text, in whole or in part."""
        special = self._where_special(tokens)
        if not len(special):
            return False
        values = Values(pieces)
        touching = special[values.touch(tokens.begins[special], tokens.ends[special])]
        return any(self._is_stolen(int(tokens.ids[i]), *_span(tokens, i), text, values) for i in touching)

    def _is_stolen(self, id_: int, begin: int, end: int, text: str, values: "Values") -> bool:
        """Return whether more than white space of a special token's text is a value's."""
        written = text[begin:end]
        if written.strip() not in self._spellings:
            return id_ != self._unknown_id  # that one stands for what can't be spelled
        first = begin + len(written) - len(written.lstrip())
        last = end - len(written) + len(written.rstrip())
        return bool(values.touch(np.array([first]), np.array([last]))[0])

    def _where_special(self, tokens: Tokens) -> NDArray[np.intp]:
        return np.flatnonzero(np.isin(tokens.ids, self._special_array))

    def tokens_apart(self, pieces: tuple[Piece, ...], limit: int | None = None) -> Tokens:
        """Tokenize around the template's own special tokens; all the rest is plain text."""
        rows: list[Tokens] = []
        begin = 0
        text = joined(pieces)
        for first, last, id_ in self._own_specials(pieces, text):
            rows.append(self._plain_text(text[begin:first], begin, limit))
            rows.append(row([id_], [(first, last)]))
            begin = last
        return chained([*rows, self._plain_text(text[begin:], begin, limit)])

    def _own_specials(self, pieces: tuple[Piece, ...], text: str) -> Iterator[tuple[int, int, int]]:
        """Yield where the template's literals write special tokens: begin, end, id."""
        position = end = 0
        for piece in pieces:
            if piece.field is None:
                tokens = self._plain.tokens(piece.text, is_continued=position > 0).moved(position)
                for index in self._where_special(tokens):
                    id_ = int(tokens.ids[index])
                    begin, last = _span(tokens, index)
                    if self._is_spelled(id_, begin, last, text):
                        begin, end = self._stripped(id_, begin, last, text, floor=end)
                        yield begin, end, id_
            position += len(piece.text)

    def _stripped(self, id_: int, first: int, last: int, text: str, *, floor: int) -> tuple[int, int]:
        """Widen a span over the white space that the special token swallows, down to `floor` at most."""
        token = self._special[id_]
        while token.lstrip and first > floor and text[first - 1].isspace():
            first -= 1
        while token.rstrip and last < len(text) and text[last].isspace():
            last += 1
        return max(first, floor), max(last, floor)

    def _plain_text(self, text: str, offset: int, limit: int | None) -> Tokens:
        """Tokenize text in which nothing is special, not even what the model itself calls special.

        Some models have their special tokens among the ordinary pieces, and find them in the text
        by themselves. There the text is split inside the word.
        """
        tokens = self.literal.tokens(text, is_continued=offset > 0, limit=limit)
        middles = [
            self._middle(*span, text)
            for index in self._where_special(tokens)
            if self._is_spelled(int(tokens.ids[index]), *(span := _span(tokens, index)), text)
        ]
        if not middles:
            return tokens.moved(offset)
        borders = pairwise([0, *middles, len(text)])
        return chained([self._plain_text(text[first:last], offset + first, limit) for first, last in borders])

    def _is_spelled(self, id_: int, begin: int, end: int, text: str) -> bool:
        """Return whether it is more than the unknown token, which stands for what can't be spelled."""
        return id_ != self._unknown_id or text[begin:end].strip() in self._spellings

    def _middle(self, begin: int, end: int, text: str) -> int:
        """Return where to split the text so that this special token can't be found in it."""
        if end - begin < 2:
            raise InvalidRequest(
                f"inputs holds {text[begin:end]!r}, which this tokenizer can only write as a special token; "
                "leave it out.",
                param="inputs",
            )
        return end - 1


class Values:
    """Which characters of a rendered text are values', and where empty values stand."""

    def __init__(self, pieces: tuple[Piece, ...]) -> None:
        spans = value_spans(pieces)
        marks = np.zeros(1 + sum(len(piece.text) for piece in pieces), dtype=np.int32)
        for first, last in spans:
            marks[first + 1 : last + 1] = 1
        self._counts = np.cumsum(marks, dtype=np.int32)
        self._empty = np.array([first for first, last in spans if first == last], dtype=np.int32)

    def touch(self, begins: NDArray[Any], ends: NDArray[Any]) -> NDArray[np.bool_]:
        """Return which spans hold a character of a value, or have an empty one inside; all arrays are [T]."""
        inside = np.searchsorted(self._empty, ends, "left") > np.searchsorted(self._empty, begins, "right")
        return inside | self.fill(begins, ends)

    def fill(self, begins: NDArray[Any], ends: NDArray[Any]) -> NDArray[np.bool_]:
        """Return which spans hold a character of a value; all arrays are [T]."""
        return np.asarray(self._counts[ends] > self._counts[begins])


def value_spans(pieces: tuple[Piece, ...]) -> list[tuple[int, int]]:
    """Return begin and end of each value in the whole text, empty ones included."""
    spans = []
    position = 0
    for piece in pieces:
        if piece.field is not None:
            spans.append((position, position + len(piece.text)))
        position += len(piece.text)
    return spans


def _span(tokens: Tokens, index: Any) -> tuple[int, int]:
    return int(tokens.begins[index]), int(tokens.ends[index])


def _backend(source: str, *, is_literal: bool = False) -> Tokenizer:
    """Return a tokenizer with spans of all the text: a post-processor would trim some of them."""
    backend = Tokenizer.from_str(source)
    backend.no_truncation()
    backend.no_padding()
    backend.post_processor = None
    backend.encode_special_tokens = is_literal
    return backend


def _flagged(source: str, control: frozenset[str]) -> str:
    """Return the tokenizer with these tokens flagged as special."""
    description = json.loads(source)
    for token in description["added_tokens"]:
        token["special"] = token["special"] or token["content"] in control
    return json.dumps(description)


def _without_first_prefix(source: str) -> str:
    """Return the tokenizer for text that continues other text: no space is put before its first word."""
    description = json.loads(source)

    def visit(part: Any) -> None:
        if isinstance(part, dict):
            if part.get("type") == "Metaspace" and part.get("prepend_scheme") == "first":
                part["prepend_scheme"] = "never"
            for child in part.get("pretokenizers", []):
                visit(child)

    visit(description.get("pre_tokenizer"))
    return json.dumps(description)
