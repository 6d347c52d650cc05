"""Rendered text to token ids.

The result is what `tokenizer(text)` gives for the whole rendered text (BOS and the like come from
the tokenizer's own post-processor), with two differences: BOS stands once even where the template
writes it out, and a special token spelled out in a *value* is plain text. A template's own special
tokens do count. Chats get nothing from the post-processor: their template writes all.

Which of a task's first ids never change is found by tokenizing, not by cutting text: template and
value tokenized apart can split differently from both together.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from app.errors import InvalidRequest
from app.text.encoding import STRETCH, Tokens, chained, row
from app.text.guarded_encoder import GuardedEncoder
from app.text.template import Piece, Template, joined
from app.text.truncation import TruncationSide, truncated

# Values of many kinds, so that what the first ids of all have in common doesn't depend on the value.
_SAMPLE_VALUES = ("a", " a", "The", "s", "1", "\n", "\n\n", " ", ".", "é", "漢字", "🙂", "-", "'s", "_", "=")

_SLACK = 8  # normalizers drop characters and unknown ones share a token, so length alone proves little


@dataclass(frozen=True, slots=True)
class Tokenized:
    """Ids of a rendered text, and the text itself, shorter where it was truncated."""

    ids: tuple[int, ...]
    text: str


class PromptTokenizer:
    """Tokenizes rendered templates. Safe to use from many threads."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        control: frozenset[str] = frozenset(),
        stretch: int = STRETCH,
        side: TruncationSide = TruncationSide.LEFT,
    ) -> None:
        """`control` are added tokens that count as special though they aren't flagged so.

        `stretch`: characters that are tokenized at once; `side`: the end of a text that truncation takes.
        """
        self._side = side
        self._encoder = GuardedEncoder(tokenizer, control, stretch)
        self.special_ids = self._encoder.special_ids
        self._backend = self._encoder.backend
        added = self._backend.get_added_tokens_decoder().items()
        self._id_of = {
            token.content: id_ for id_, token in added if token.special and token.content not in control
        }
        self._bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int | None = tokenizer.eos_token_id
        self.pad_id: int | None = tokenizer.pad_token_id
        self._before, self._after = _added_around(self._backend)
        self._longest_token = max((len(token) for token in self._backend.get_vocab()), default=1)

    def special_id(self, text: str) -> int | None:
        """Return the id of the special token written `text`, if there is one."""
        return self._id_of.get(text)

    def token_id(self, text: str) -> int | None:
        """Return the id of the one token that the vocabulary writes so, if there is one."""
        id_: int | None = self._backend.token_to_id(text)
        return id_

    def plain_ids(self, text: str) -> tuple[int, ...]:
        """Return the ids of a text alone, without any special token."""
        return _tuple(self._encoder.literal.tokens(text))

    def ids_after(self, before: str, text: str) -> tuple[int, ...]:
        """Return the ids of a short text of the author's that goes on after another; special tokens count.

        Where both together split otherwise, they are those of the text alone.
        """
        pieces = Piece(before, "before"), Piece(text)
        whole, first = (_tuple(self._encoder.tokens(each)) for each in (pieces, pieces[:1]))
        return whole[len(first) :] if whole[: len(first)] == first else self.ids_after("", text)

    def text_of(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens."""
        [text] = self._backend.decode_batch([list(ids)], skip_special_tokens=True)  # other threads run on
        return str(text)

    @cached_property
    def puts_spaces(self) -> bool:
        """Whether a text that is tokenized alone reads as a word of its own after other text."""
        ids = self.plain_ids("a")
        return self.text_of((*ids, *ids)) == "a a"

    def surely_longer(self, num_chars: int, limit: int) -> bool:
        """Return whether a text's length alone shows that it is far too long for `limit` tokens."""
        return num_chars > limit * self._longest_token * _SLACK

    def tokenize(
        self,
        template: Template,
        values: Mapping[str, str],
        truncate: int | None = None,
        limit: int | None = None,
    ) -> Tokenized:
        """Render and tokenize; `truncate` keeps the last so many tokens of the fields' values.

        On the right side it is the length of the whole, with what the post-processor adds, as in
        `tokenizer(text, truncation=True, max_length=...)`; only values get shorter.

        Raise RequestTooLong: a long text surely has more than `limit` tokens; shorter ones aren't counted.
        Raise InvalidRequest: a value holds what can only be written as a special token.
        """
        return self._tokenized(template.render(values), truncate, limit, is_chat=False)

    def tokenize_chat(
        self, pieces: tuple[Piece, ...], truncate: int | None = None, limit: int | None = None
    ) -> Tokenized:
        """Tokenize a rendered chat, of which all is written out already. Raise as `tokenize`."""
        return self._tokenized(pieces, truncate, limit, is_chat=True)

    def _tokenized(
        self, pieces: tuple[Piece, ...], truncate: int | None, limit: int | None, *, is_chat: bool
    ) -> Tokenized:
        if truncate is not None:
            added = (
                0 if is_chat or self._side is TruncationSide.LEFT else len(self._before) + len(self._after)
            )
            pieces = truncated(self._encoder, pieces, max(truncate - added, 0), limit, self._side)
        tokens = self._encoder.tokens(pieces, limit)
        return Tokenized(_tuple(tokens if is_chat else self._whole(tokens)), joined(pieces))

    def leading_ids(self, template: Template) -> tuple[int, ...]:
        """Return the first ids that don't depend on the values: BOS and the template's leading text.

        A request may use them only where its own ids start with exactly these.
        """
        # Later text has no influence.
        begin = Template(template.pieces[: 2 if template.leading else 1], template.fields[:1])
        rendered = (begin.render(dict.fromkeys(begin.fields, value)) for value in _SAMPLE_VALUES)
        samples = [_tuple(self._whole(self._encoder.tokens(pieces), is_open=True)) for pieces in rendered]
        return tuple(_common_prefix(samples))

    def _whole(self, tokens: Tokens, *, is_open: bool = False) -> Tokens:
        """Add what the post-processor adds; after an open text other text will come."""
        tokens = chained([self._before, tokens, *([] if is_open else [self._after])])
        if len(tokens) > 1 and tokens.ids[0] == tokens.ids[1] == self._bos_id:
            tokens = Tokens(tokens.ids[1:], tokens.begins[1:], tokens.ends[1:])
        return tokens


def _added_around(backend: Tokenizer) -> tuple[Tokens, Tokens]:
    """Return what the post-processor puts before and after any text (BOS, EOS)."""
    probe = backend.encode("a")
    own = [index for index, mask in enumerate(probe.special_tokens_mask) if not mask]
    first, last = (own[0], own[-1] + 1) if own else (len(probe.ids), len(probe.ids))
    return row(probe.ids[:first]), row(probe.ids[last:])


def _tuple(tokens: Tokens) -> tuple[int, ...]:
    return tuple(tokens.ids.tolist())


def _common_prefix(rows: list[tuple[int, ...]]) -> Iterator[int]:
    # One id of the shortest row is always left out: a request needs a token of its own.
    for column in islice(zip(*rows, strict=False), max(min(map(len, rows)) - 1, 0)):
        if len(set(column)) > 1:
            return
        yield column[0]


def check_not_empty(tokenized: Tokenized) -> None:
    """Raise InvalidRequest where the model would read nothing besides its learned tokens."""
    if not tokenized.ids:
        raise InvalidRequest("inputs is empty: it gives the model nothing to read.", param="inputs")


def check_no_padding(source: Sequence[int], pad_id: int | None, eos_ids: Collection[int]) -> None:
    """Refuse padding in what an encoder reads: `generate` hides it, and some count no position for it.

    Raise InvalidRequest.
    """
    if pad_id in source and pad_id not in eos_ids:
        raise InvalidRequest(
            f"inputs hold the padding token (id {pad_id}), which an encoder doesn't read; leave it out.",
            param="inputs",
        )
