"""Token ids to text, one at a time.

The pieces joined are the text of the whole sequence. A character with bytes in several tokens comes
out with its last byte; bytes that can never become a character come out as U+FFFD, as in Python's own
decoder. Special tokens have no text in the output.

`tokenizers.decoders.DecodeStream` is no substitute: it raises once the bytes of a byte-fallback vocabulary
turn out to be no character, and can't give out what it holds back at the end.
"""

import codecs
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_CONTEXT = 6  # tokens of the prompt that decide how the first token reads (a space, or none)


@dataclass(frozen=True, slots=True)
class DetokenizerTables:
    """Tables that detokenizing needs of a tokenizer, made once."""

    backend: Any  # tokenizers.Tokenizer
    special_ids: frozenset[int]
    bytes_of: dict[int, bytes]  # of ids with a text that doesn't depend on their neighbours
    is_byte_level: bool  # every id is such an id

    def text_of(self, token_id: int) -> str:
        """Return the text of one token alone; a special one as the vocabulary writes it."""
        if token_id in self.special_ids:
            return self.literal(token_id)
        if token_id in self.bytes_of:
            return self.bytes_of[token_id].decode("utf-8", "replace")
        text: str = self.backend.decode([token_id], skip_special_tokens=True)
        return text

    def literal(self, token_id: int) -> str:
        """Return the token as the vocabulary writes it; empty for an id that has no token."""
        return self.backend.id_to_token(token_id) or ""


def detokenizer_tables(tokenizer: PreTrainedTokenizerFast) -> DetokenizerTables:
    """Read the tables from a tokenizer of any kind."""
    backend = tokenizer.backend_tokenizer
    vocab: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    special = frozenset(id_ for id_, token in backend.get_added_tokens_decoder().items() if token.special)
    byte_level = _decoder_types(backend) == ["ByteLevel"]
    if byte_level:
        bytes_of = {id_: _byte_level_bytes(token) for token, id_ in vocab.items()}
    elif "ByteFallback" in _decoder_types(backend):
        matches = ((id_, _BYTE_TOKEN.fullmatch(token)) for token, id_ in vocab.items())
        bytes_of = {id_: bytes([int(match[1], 16)]) for id_, match in matches if match}
    else:
        bytes_of = {}
    return DetokenizerTables(backend, special, bytes_of, byte_level)


def _decoder_types(backend: Any) -> list[str]:
    decoder = json.loads(backend.to_str()).get("decoder") or {}
    parts = decoder.get("decoders", [decoder])
    return [part.get("type", "") for part in parts]


def _byte_level_alphabet() -> dict[str, int]:
    """Return GPT-2's map of the 256 bytes to printable characters, reversed."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }


_ALPHABET = _byte_level_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    """Return the bytes of a token; one that isn't written in the alphabet stands for itself."""
    if all(character in _ALPHABET for character in token):
        return bytes(_ALPHABET[character] for character in token)
    return token.encode()


class Detokenizer:
    """Turns the ids of one sequence into text. `push` and `flush` return what has become certain."""

    def __init__(self, tables: DetokenizerTables, context: Sequence[int] = ()) -> None:
        """`context`: ids that stand before the text, such as the prompt's."""
        self._tables = tables
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        # Ids with settled text, then the others, which are decoded after the first.
        visible = () if tables.is_byte_level else context
        self._settled = [id_ for id_ in visible if id_ not in tables.special_ids][-_CONTEXT:]
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """Take the next id; return the text that it completes."""
        if token_id in self._tables.special_ids:
            return ""
        data = self._tables.bytes_of.get(token_id)
        if data is not None:
            if self._tables.is_byte_level and not self._pending:
                return self._utf8.decode(data)
            text = self._decode_pending()
            return text + self._utf8.decode(self._seen_first(token_id, data))
        broken = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        self._pending.append(token_id)
        text = self._window()
        return broken + ("" if text.endswith("\ufffd") else self._settle(text))

    def push_literal(self, token_id: int) -> str:
        """Take a special token that is to be part of the text; return it as the vocabulary writes it."""
        text = self.flush()
        self._utf8.reset()
        return text + self._tables.literal(token_id)

    def _seen_first(self, token_id: int, data: bytes) -> bytes:
        """Return the bytes, unless they are a space that the decoder takes away from the start of a text."""
        if self._tables.is_byte_level:
            return data
        is_lost = not self._settled and not self._decode([token_id])
        self._settled = [*self._settled, token_id][-_CONTEXT:]
        return b"" if is_lost else data

    def flush(self) -> str:
        """End the sequence; return what was held back."""
        return self._decode_pending() + self._utf8.decode(b"", final=True)

    def _decode_pending(self) -> str:
        return self._settle(self._window()) if self._pending else ""

    def _window(self) -> str:
        """Return the text of the pending ids, as it reads after the settled ones."""
        before = self._decode(self._settled)
        return self._decode(self._settled + self._pending)[len(before) :]

    def _settle(self, text: str) -> str:
        self._settled = self._pending if text else (self._settled + self._pending)[-_CONTEXT:]
        self._pending = []
        return text

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tables.backend.decode(ids, skip_special_tokens=True)
        return text
