"""Rendered text to token ids.

The result is what `tokenizer(text)` gives for the whole rendered text (BOS and the like come from
the tokenizer's own post-processor), with two differences: BOS stands once even where the template
writes it out, and a special token spelled out in a *value* is plain text. A template's own special
tokens do count.

Which of a task's first ids never change is found by tokenizing, not by cutting text: template and
value tokenized apart can split differently from both together.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice, pairwise
from typing import Any

from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerFast

from app.errors import InvalidRequest
from app.serving.template import Piece, Template, joined

# Values of many kinds, so that what the first ids of all have in common doesn't depend on the value.
_SAMPLE_VALUES = ("a", " a", "The", "s", "1", "\n", "\n\n", " ", ".", "é", "漢字", "🙂", "-", "'s", "_", "=")

# Normalizers drop characters and unknown ones share a token, so length alone proves little.
_SLACK = 8


@dataclass(frozen=True, slots=True)
class Tokenized:
    """Ids of a rendered text, and the text itself (shorter than asked where it was truncated)."""

    ids: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True)
class _Token:
    id: int
    begin: int  # span in characters of the rendered text; empty for what the post-processor added
    end: int


class PromptTokenizer:
    """Tokenizes rendered templates. Safe to use from many threads: its backends never change."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        source = tokenizer.backend_tokenizer.to_str()
        self._plain = _backend(source)
        self._literal = _backend(source)  # special tokens in the text are ordinary characters
        self._literal.encode_special_tokens = True
        self._continued = _backend(_without_first_prefix(source))
        self._continued.encode_special_tokens = True
        added = self._plain.get_added_tokens_decoder()
        self._special_tokens = {token.content: token for token in added.values() if token.special}
        self._id_of = {token.content: id_ for id_, token in added.items() if token.special}
        self.special_ids = frozenset(id_ for id_, token in added.items() if token.special)
        self._bos_id: int | None = tokenizer.bos_token_id
        self._unknown_id: int | None = tokenizer.unk_token_id
        self._before, self._after = _added_around(self._plain)
        self._pattern = _alternation(self._special_tokens)
        self._longest_token = max((len(token) for token in self._plain.get_vocab()), default=1)

    def special_id(self, text: str) -> int | None:
        """The id of the special token written `text`, if there is one."""
        return self._id_of.get(text)

    def plain_ids(self, text: str) -> tuple[int, ...]:
        """Ids of a text alone, without any special token."""
        return tuple(self._literal.encode(text, add_special_tokens=False).ids)

    def text_of(self, ids: Sequence[int]) -> str:
        """Ids as text, special tokens left out."""
        text: str = self._plain.decode(list(ids), skip_special_tokens=True)
        return text

    def surely_longer(self, template: Template, values: Mapping[str, str], limit: int) -> bool:
        """Whether the text is far too long for `limit` tokens, told from its length alone."""
        return template.num_chars(values) > limit * self._longest_token * _SLACK

    def tokenize(
        self, template: Template, values: Mapping[str, str], truncate: int | None = None
    ) -> Tokenized:
        """Render and tokenize; `truncate` keeps the last so many tokens of the fields' values.

        Truncation cuts the values' text at a token's border and tokenizes again, so that the model
        always sees a whole, natural tokenization of a rendered template.
        """
        pieces = template.render(values)
        tokens = self._tokens(pieces)
        if truncate is not None:
            pieces, tokens = self._truncated(pieces, tokens, truncate)
        return Tokenized(tuple(token.id for token in tokens), joined(pieces))

    def _truncated(
        self, pieces: tuple[Piece, ...], tokens: list[_Token], keep: int
    ) -> tuple[tuple[Piece, ...], list[_Token]]:
        target = keep
        for attempt in count():
            own = _tokens_of_values(tokens, pieces)
            if len(own) <= keep:
                break
            pieces = _without(pieces, _cut(own, pieces, target))
            tokens = self._tokens(pieces)
            # What is left can split into more tokens than before; the cut then grows until it fits.
            target = max(keep - (1 << attempt) // 8, 0)
        return pieces, tokens

    def leading_ids(self, template: Template) -> tuple[int, ...]:
        """First ids that don't depend on the values: BOS and the template's leading text.

        A request may use them only where its own ids start with exactly these.
        """
        samples = [
            [token.id for token in self._tokens(template.render(dict.fromkeys(template.fields, value)))]
            for value in _SAMPLE_VALUES
        ]
        return tuple(_common_prefix(samples))

    def _tokens(self, pieces: tuple[Piece, ...]) -> list[_Token]:
        text = joined(pieces)
        tokens = _spans(self._plain.encode(text))
        if any(self._is_forged(token, text, pieces) for token in tokens):
            tokens = self._tokens_apart(pieces)
        if len(tokens) > 1 and tokens[0].id == tokens[1].id == self._bos_id:
            del tokens[0]
        return tokens

    def _is_forged(self, token: _Token, text: str, pieces: tuple[Piece, ...]) -> bool:
        """Whether a special token comes from a value's text, in whole or in part."""
        if token.id not in self.special_ids or token.begin == token.end:
            return False
        written = text[token.begin : token.end]
        if written.strip() not in self._special_tokens:
            return token.id != self._unknown_id  # that one stands for what can't be spelled
        begin = token.begin + len(written) - len(written.lstrip())
        end = token.end - len(written) + len(written.rstrip())
        return any(first < end and begin < last for first, last in _value_spans(pieces))

    def _tokens_apart(self, pieces: tuple[Piece, ...]) -> list[_Token]:
        """Tokenize around the template's own special tokens; all the rest is plain text."""
        tokens: list[_Token] = []
        begin = 0
        text = joined(pieces)
        for first, last, id_ in self._own_specials(pieces):
            tokens += self._plain_text(text[begin:first], begin)
            tokens.append(_Token(id_, first, last))
            begin = last
        tokens += self._plain_text(text[begin:], begin)
        return [*self._before, *tokens, *self._after]

    def _own_specials(self, pieces: tuple[Piece, ...]) -> Iterator[tuple[int, int, int]]:
        """Where the template's literals write special tokens: begin, end, id."""
        position = 0
        for piece in pieces:
            if piece.field is None and self._pattern is not None:
                for match in self._pattern.finditer(piece.text):
                    first, last = self._stripped(match, piece.text)
                    yield position + first, position + last, self._id_of[match.group()]
            position += len(piece.text)

    def _stripped(self, match: re.Match[str], text: str) -> tuple[int, int]:
        """Widen a match over the white space that the special token swallows."""
        token = self._special_tokens[match.group()]
        first, last = match.span()
        if token.lstrip:
            first = len(text[:first].rstrip())
        if token.rstrip:
            last = len(text) - len(text[last:].lstrip())
        return first, last

    def _plain_text(self, text: str, offset: int) -> list[_Token]:
        """Tokenize text in which nothing is special, not even what the model itself calls so.

        Some models have their special tokens among the ordinary pieces, and find them in the text
        without being asked. There the text is split inside the word.
        """
        if not text:
            return []
        backend = self._continued if offset else self._literal
        tokens = _spans(backend.encode(text, add_special_tokens=False))
        middles = [self._middle(token, text) for token in tokens if self._is_spelled_special(token, text)]
        if not middles:
            return [_Token(token.id, token.begin + offset, token.end + offset) for token in tokens]
        borders = pairwise([0, *middles, len(text)])
        return [
            token for first, last in borders for token in self._plain_text(text[first:last], offset + first)
        ]

    def _is_spelled_special(self, token: _Token, text: str) -> bool:
        if token.id not in self.special_ids:
            return False
        return token.id != self._unknown_id or text[token.begin : token.end] in self._special_tokens

    def _middle(self, token: _Token, text: str) -> int:
        """Where to split the text so that this special token can't be found in it."""
        if token.end - token.begin < 2:
            raise InvalidRequest(
                f"inputs holds {text[token.begin : token.end]!r}, which this tokenizer can only write as a "
                "special token; leave it out.",
                param="inputs",
            )
        return token.end - 1


def _backend(source: str) -> Tokenizer:
    backend = Tokenizer.from_str(source)
    backend.no_truncation()
    backend.no_padding()
    return backend


def _added_around(backend: Tokenizer) -> tuple[list[_Token], list[_Token]]:
    """What the post-processor puts before and after any text (BOS, EOS)."""
    probe = backend.encode("a")
    added = [_Token(id_, 0, 0) for id_ in probe.ids]
    own = [index for index, mask in enumerate(probe.special_tokens_mask) if not mask]
    return (added[: own[0]], added[own[-1] + 1 :]) if own else (added, [])


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


def _alternation(words: Iterable[str]) -> re.Pattern[str] | None:
    ordered = sorted(words, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


def _spans(encoding: Encoding) -> list[_Token]:
    return [
        _Token(id_, *((0, 0) if added else span))
        for id_, span, added in zip(encoding.ids, encoding.offsets, encoding.special_tokens_mask, strict=True)
    ]


def _value_spans(pieces: tuple[Piece, ...]) -> list[tuple[int, int]]:
    spans = []
    position = 0
    for piece in pieces:
        if piece.field is not None:
            spans.append((position, position + len(piece.text)))
        position += len(piece.text)
    return spans


def _tokens_of_values(tokens: list[_Token], pieces: tuple[Piece, ...]) -> list[_Token]:
    spans = _value_spans(pieces)
    own = []
    covered = 0
    for token in tokens:
        # Some tokenizers leave white space out of a span; it belongs to the token after it.
        begin, covered = min(token.begin, covered), max(token.end, covered)
        if any(first < token.end and begin < last for first, last in spans):
            own.append(token)
    return own


def _cut(own: list[_Token], pieces: tuple[Piece, ...], keep: int) -> int:
    """Up to which character of the rendered text the values must go, so that `keep` tokens are left."""
    first = next(begin for begin, end in _value_spans(pieces) if begin < end)
    # The end of the last dropped token rather than the start of the first kept one, whose span may
    # leave out the space before it. At least one character goes, so that this ends.
    return max(own[len(own) - keep - 1].end, first + 1)


def _without(pieces: tuple[Piece, ...], cut: int) -> tuple[Piece, ...]:
    """The pieces with the values' text before character `cut` taken out."""
    kept = []
    position = 0
    for piece in pieces:
        gone = min(max(cut - position, 0), len(piece.text)) if piece.field is not None else 0
        kept.append(Piece(piece.text[gone:], piece.field))
        position += len(piece.text)
    return tuple(kept)


def _common_prefix(rows: list[list[int]]) -> Iterator[int]:
    # One id of the shortest row is always left out: a request needs a token of its own.
    for column in islice(zip(*rows, strict=False), max(min(map(len, rows)) - 1, 0)):
        if len(set(column)) > 1:
            return
        yield column[0]


def check_not_empty(tokenized: Tokenized) -> None:
    """The model must be given something to read besides its learned tokens."""
    if not tokenized.ids:
        raise InvalidRequest("inputs is empty: it gives the model nothing to read.", param="inputs")
