"""Rendered text to token ids.

The result is what `tokenizer(text)` gives for the whole rendered text (BOS and the like come from
the tokenizer's own post-processor), with two differences: BOS stands once even where the template
writes it out, and a special token spelled out in a *value* is plain text. A template's own special
tokens do count. Chats get nothing from the post-processor: their template writes all.

Which of a task's first ids never change is found by tokenizing, not by cutting text: template and
value tokenized apart can split differently from both together.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from app.errors import InvalidRequest
from app.text.encoding import STRETCH, Encoder, Tokens, chained, row
from app.text.template import Piece, Template, joined

# Values of many kinds, so that what the first ids of all have in common doesn't depend on the value.
_SAMPLE_VALUES = ("a", " a", "The", "s", "1", "\n", "\n\n", " ", ".", "é", "漢字", "🙂", "-", "'s", "_", "=")

# Normalizers drop characters and unknown ones share a token, so length alone proves little.
_SLACK = 8
_MARGIN = 4  # tokens that can differ where a value begins and ends


@dataclass(frozen=True, slots=True)
class Tokenized:
    """Ids of a rendered text, and the text itself (shorter than asked where it was truncated)."""

    ids: tuple[int, ...]
    text: str


class PromptTokenizer:
    """Tokenizes rendered templates. Safe to use from many threads: its backends never change."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        control: frozenset[str] = frozenset(),
        stretch: int = STRETCH,
    ) -> None:
        """`control` are added tokens that count as special though they aren't flagged so.

        `stretch`: characters that are tokenized at once.
        """
        source = _flagged(tokenizer.backend_tokenizer.to_str(), control)
        continued = _without_first_prefix(source)
        self._backend = Tokenizer.from_str(source)
        self._plain = Encoder(_backend(source), _backend(continued), stretch)
        # Special tokens in the text are ordinary characters.
        self._literal = Encoder(
            _backend(source, is_literal=True), _backend(continued, is_literal=True), stretch
        )
        self._stretch = stretch
        added = self._backend.get_added_tokens_decoder()
        self._special = {id_: token for id_, token in added.items() if token.special}
        self._spellings = {token.content for token in self._special.values()}
        self._special_array = np.array(sorted(self._special), dtype=np.int32)
        self._id_of = {
            token.content: id_ for id_, token in self._special.items() if token.content not in control
        }
        self._bos_id: int | None = tokenizer.bos_token_id
        self._unknown_id: int | None = tokenizer.unk_token_id
        self._before, self._after = _added_around(self._backend)
        self._longest_token = max((len(token) for token in self._backend.get_vocab()), default=1)

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that no value's text becomes."""
        return frozenset(self._special)

    def special_id(self, text: str) -> int | None:
        """The id of the special token written `text`, if there is one."""
        return self._id_of.get(text)

    def plain_ids(self, text: str) -> tuple[int, ...]:
        """Ids of a text alone, without any special token."""
        return _tuple(self._literal.tokens(text))

    def text_of(self, ids: Sequence[int]) -> str:
        """Ids as text, special tokens left out."""
        [text] = self._backend.decode_batch([list(ids)], skip_special_tokens=True)  # other threads run on
        return str(text)

    def surely_longer(self, num_chars: int, limit: int) -> bool:
        """Whether a text is far too long for `limit` tokens, told from its length alone."""
        return num_chars > limit * self._longest_token * _SLACK

    def tokenize(
        self,
        template: Template,
        values: Mapping[str, str],
        truncate: int | None = None,
        limit: int | None = None,
    ) -> Tokenized:
        """Render and tokenize; `truncate` keeps the last so many tokens of the fields' values.

        Truncation cuts the values' text at a token's border and tokenizes again, so that the model
        always sees a whole, natural tokenization of a rendered template.

        Raises:
            RequestTooLong: a long text surely has more than `limit` tokens; shorter ones aren't counted here.
            InvalidRequest: a value holds what can only be written as a special token.
        """
        return self._tokenized(template.render(values), truncate, limit, is_chat=False)

    def tokenize_chat(
        self, pieces: tuple[Piece, ...], truncate: int | None = None, limit: int | None = None
    ) -> Tokenized:
        """The same for a rendered chat, of which all is written out already."""
        return self._tokenized(pieces, truncate, limit, is_chat=True)

    def _tokenized(
        self, pieces: tuple[Piece, ...], truncate: int | None, limit: int | None, *, is_chat: bool
    ) -> Tokenized:
        if truncate is not None:
            pieces = self._truncated(pieces, truncate, limit)
        tokens = self._tokens(pieces, limit)
        return Tokenized(_tuple(tokens if is_chat else self._whole(tokens)), joined(pieces))

    def _truncated(self, pieces: tuple[Piece, ...], keep: int, limit: int | None) -> tuple[Piece, ...]:
        if limit is not None and keep <= limit:
            pieces, limit = self._shortened(pieces, keep), None  # what is cut off needn't fit
        target = keep
        for attempt in count():
            tokens = self._tokens(pieces, limit)
            own = _of_values(tokens, pieces)
            if len(own) <= keep:
                break
            pieces = _without(pieces, _cut(tokens.ends[own], pieces, target))
            # What is left can split into more tokens than before; the cut then grows until it fits.
            target = max(keep - (1 << attempt) // 8, 0)
        return pieces

    def _shortened(self, pieces: tuple[Piece, ...], keep: int) -> tuple[Piece, ...]:
        """Drop what truncation surely drops of long values, and so needn't be tokenized with the rest."""
        values = [piece for piece in pieces if piece.field is not None]
        if sum(len(piece.text) for piece in values) <= self._stretch:
            return pieces
        left = keep + _MARGIN * (len(values) + 2)
        kept: list[Piece] = []
        for piece in reversed(pieces):
            if piece.field is not None:
                begin, number = self._literal.ending(piece.text, left)
                piece, left = Piece(piece.text[begin:], piece.field), max(left - number, 0)
            kept.append(piece)
        return tuple(reversed(kept))

    def leading_ids(self, template: Template) -> tuple[int, ...]:
        """First ids that don't depend on the values: BOS and the template's leading text.

        A request may use them only where its own ids start with exactly these.
        """
        pieces = template.pieces[: 2 if template.leading else 1]  # no later text has a part in it
        samples = [
            _tuple(self._whole(self._tokens(_filled(pieces, value)), is_open=True))
            for value in _SAMPLE_VALUES
        ]
        return tuple(_common_prefix(samples))

    def _whole(self, tokens: Tokens, *, is_open: bool = False) -> Tokens:
        """With what the post-processor adds; an open text is to go on."""
        tokens = chained([self._before, tokens, *([] if is_open else [self._after])])
        if len(tokens) > 1 and tokens.ids[0] == tokens.ids[1] == self._bos_id:
            tokens = Tokens(tokens.ids[1:], tokens.begins[1:], tokens.ends[1:])
        return tokens

    def _tokens(self, pieces: tuple[Piece, ...], limit: int | None = None) -> Tokens:
        text = joined(pieces)
        tokens = self._plain.tokens(text, limit=limit)
        if self._is_forged(tokens, text, pieces):
            tokens = self._tokens_apart(pieces, limit)
        return tokens

    def _is_forged(self, tokens: Tokens, text: str, pieces: tuple[Piece, ...]) -> bool:
        """Whether any special token comes from a value's text, in whole or in part."""
        special = self._where_special(tokens)
        if not len(special):
            return False
        values = _Values(pieces)
        touching = special[values.touch(tokens.begins[special], tokens.ends[special])]
        return any(self._is_stolen(int(tokens.ids[i]), *_span(tokens, i), text, values) for i in touching)

    def _is_stolen(self, id_: int, begin: int, end: int, text: str, values: "_Values") -> bool:
        """Whether more than white space of a special token's text is a value's."""
        written = text[begin:end]
        if written.strip() not in self._spellings:
            return id_ != self._unknown_id  # that one stands for what can't be spelled
        first = begin + len(written) - len(written.lstrip())
        last = end - len(written) + len(written.rstrip())
        return bool(values.touch(np.array([first]), np.array([last]))[0])

    def _where_special(self, tokens: Tokens) -> NDArray[np.intp]:
        return np.flatnonzero(np.isin(tokens.ids, self._special_array))

    def _tokens_apart(self, pieces: tuple[Piece, ...], limit: int | None = None) -> Tokens:
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
        """Where the template's literals write special tokens: begin, end, id."""
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
        """Tokenize text in which nothing is special, not even what the model itself calls so.

        Some models have their special tokens among the ordinary pieces, and find them in the text
        without being asked. There the text is split inside the word.
        """
        tokens = self._literal.tokens(text, is_continued=offset > 0, limit=limit)
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
        """Whether it is more than the unknown token, for what can't be spelled."""
        return id_ != self._unknown_id or text[begin:end].strip() in self._spellings

    def _middle(self, begin: int, end: int, text: str) -> int:
        """Where to split the text so that this special token can't be found in it."""
        if end - begin < 2:
            raise InvalidRequest(
                f"inputs holds {text[begin:end]!r}, which this tokenizer can only write as a special token; "
                "leave it out.",
                param="inputs",
            )
        return end - 1


def _backend(source: str, *, is_literal: bool = False) -> Tokenizer:
    """A tokenizer whose spans are all of the text: a post-processor would trim some of them."""
    backend = Tokenizer.from_str(source)
    backend.no_truncation()
    backend.no_padding()
    backend.post_processor = None
    backend.encode_special_tokens = is_literal
    return backend


def _added_around(backend: Tokenizer) -> tuple[Tokens, Tokens]:
    """What the post-processor puts before and after any text (BOS, EOS)."""
    probe = backend.encode("a")
    own = [index for index, mask in enumerate(probe.special_tokens_mask) if not mask]
    first, last = (own[0], own[-1] + 1) if own else (len(probe.ids), len(probe.ids))
    return row(probe.ids[:first]), row(probe.ids[last:])


def _flagged(source: str, control: frozenset[str]) -> str:
    """The tokenizer with these tokens flagged as special."""
    description = json.loads(source)
    for token in description["added_tokens"]:
        token["special"] = token["special"] or token["content"] in control
    return json.dumps(description)


def _without_first_prefix(source: str) -> str:
    """The tokenizer for text that continues other text: no space is put before its first word."""
    description = json.loads(source)

    def visit(part: Any) -> None:
        if isinstance(part, dict):
            if part.get("type") == "Metaspace" and part.get("prepend_scheme") == "first":
                part["prepend_scheme"] = "never"
            for child in part.get("pretokenizers", []):
                visit(child)

    visit(description.get("pre_tokenizer"))
    return json.dumps(description)


def _tuple(tokens: Tokens) -> tuple[int, ...]:
    return tuple(tokens.ids.tolist())


def _span(tokens: Tokens, index: Any) -> tuple[int, int]:
    return int(tokens.begins[index]), int(tokens.ends[index])


def _filled(pieces: tuple[Piece, ...], value: str) -> tuple[Piece, ...]:
    return tuple(piece if piece.field is None else Piece(value, piece.field) for piece in pieces)


def _value_spans(pieces: tuple[Piece, ...]) -> list[tuple[int, int]]:
    spans = []
    position = 0
    for piece in pieces:
        if piece.field is not None:
            spans.append((position, position + len(piece.text)))
        position += len(piece.text)
    return spans


class _Values:
    """Which characters of a rendered text are values', and where empty values stand."""

    def __init__(self, pieces: tuple[Piece, ...]) -> None:
        spans = _value_spans(pieces)
        marks = np.zeros(1 + sum(len(piece.text) for piece in pieces), dtype=np.int32)
        for first, last in spans:
            marks[first + 1 : last + 1] = 1
        self._counts = np.cumsum(marks, dtype=np.int32)
        self._empty = np.array([first for first, last in spans if first == last], dtype=np.int32)

    def touch(self, begins: NDArray[Any], ends: NDArray[Any]) -> NDArray[np.bool_]:
        """Which spans hold a character of a value, or have an empty one inside; all arrays are [T]."""
        inside = np.searchsorted(self._empty, ends, "left") > np.searchsorted(self._empty, begins, "right")
        return inside | self.fill(begins, ends)

    def fill(self, begins: NDArray[Any], ends: NDArray[Any]) -> NDArray[np.bool_]:
        """Which spans hold a character of a value; all arrays are [T]."""
        return np.asarray(self._counts[ends] > self._counts[begins])


def _of_values(tokens: Tokens, pieces: tuple[Piece, ...]) -> NDArray[np.intp]:
    """Which tokens stand for some of the values' text, in whole or in part."""
    # Some tokenizers leave white space out of a span; it belongs to the token after it.
    covered = np.concatenate([[0], np.maximum.accumulate(tokens.ends)])[:-1]
    return np.flatnonzero(_Values(pieces).fill(np.minimum(tokens.begins, covered), tokens.ends))


def _cut(ends: NDArray[np.int32], pieces: tuple[Piece, ...], keep: int) -> int:
    """Up to which character of the rendered text the values must go, so that `keep` tokens are left.

    `ends`: of the values' tokens, int32 [T].
    """
    first = next(begin for begin, end in _value_spans(pieces) if begin < end)
    # The end of the last dropped token rather than the start of the first kept one, whose span may
    # leave out the space before it. At least one character goes, so that this ends.
    return max(int(ends[len(ends) - keep - 1]), first + 1)


def _without(pieces: tuple[Piece, ...], cut: int) -> tuple[Piece, ...]:
    """The pieces with the values' text before character `cut` taken out."""
    kept = []
    position = 0
    for piece in pieces:
        gone = min(max(cut - position, 0), len(piece.text)) if piece.field is not None else 0
        kept.append(Piece(piece.text[gone:], piece.field))
        position += len(piece.text)
    return tuple(kept)


def _common_prefix(rows: list[tuple[int, ...]]) -> Iterator[int]:
    # One id of the shortest row is always left out: a request needs a token of its own.
    for column in islice(zip(*rows, strict=False), max(min(map(len, rows)) - 1, 0)):
        if len(set(column)) > 1:
            return
        yield column[0]


def check_not_empty(tokenized: Tokenized) -> None:
    """The model must be given something to read besides its learned tokens."""
    if not tokenized.ids:
        raise InvalidRequest("inputs is empty: it gives the model nothing to read.", param="inputs")
