"""The document of a cartridge: its ids, parts of it, and the keys and values that a cartridge starts from."""

import hashlib
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

from app.errors import InvalidRequest
from app.prompt import TaskType
from app.sites import Site
from app.text.template import PLAIN
from app.text.tokenization import PromptTokenizer
from app.training.base import TrainingBase
from app.training.prompts.prefix import Prefix, check_frozen
from app.training.prompts.starts import keys_and_values
from app.training.settings import TrainingSettings

MAX_DOCUMENT_BYTES = 1 << 26
_END = re.compile(r"(?<=\n)|(?<=[.!?])(?=\s)")  # of a line, or of a sentence


class Document:
    """A text as the base reads it: it begins as all texts do (BOS, or nothing), and ends as a line does."""

    def __init__(self, text: str, tokenizer: PromptTokenizer, digest: str = "") -> None:
        """`digest` is the sha256 (hex) of its file."""
        self.digest = digest
        self.text = text.rstrip() + "\n"
        self._tokenizer = tokenizer
        self._beginning = tokenizer.leading_ids(PLAIN)
        self.ids = self.ids_of(self.text)

    def ids_of(self, part: str) -> tuple[int, ...]:
        """Return a part as a text of its own."""
        return (*self._beginning, *self._tokenizer.plain_ids(part))

    def without_beginning(self, source: tuple[int, ...]) -> tuple[int, ...]:
        """Return the ids of a request as they stand behind the document: it begins there no second time."""
        count = len(self._beginning)
        return source[count:] if source[:count] == self._beginning else source

    def parts(self, number: int, size: int) -> Iterator[str]:
        """Yield parts of about `size` tokens, evenly spread: whole lines and sentences, ended as a line is.

        They overlap, or repeat, as they must.
        """
        pieces = list(self._pieces(size))
        ends = list(accumulate(len(self._tokenizer.plain_ids(piece)) for piece in pieces))
        begins = [0, *ends[:-1]]
        room = max(0, ends[-1] - size)
        for index in range(number):
            first = bisect_left(begins, room * index // max(1, number - 1))
            last = max(first + 1, bisect_right(ends, begins[first] + size))
            yield "".join(pieces[first:last]).strip() + "\n"

    def _pieces(self, size: int) -> Iterator[str]:
        """Yield lines and sentences; what is longer than `size` tokens in pieces of so many."""
        for piece in _END.split(self.text):
            ids = self._tokenizer.plain_ids(piece)
            if len(ids) <= size:
                yield piece
            else:
                yield from (self._tokenizer.text_of(ids[at : at + size]) for at in range(0, len(ids), size))


def read_document(path: Path, base: TrainingBase) -> Document:
    """Read a text file. Raise InvalidRequest: it is none, it is empty, or it is too large."""
    if not path.is_file():
        raise _refused(path, "there is no such file; give a text file in UTF-8")
    if path.stat().st_size > MAX_DOCUMENT_BYTES:
        raise _refused(path, f"it has more than {MAX_DOCUMENT_BYTES} bytes; take a part of it")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _refused(path, f"it is not UTF-8 at byte {error.start}; save it as UTF-8 text") from None
    if not text.strip():
        raise _refused(path, "it is empty")
    return Document(text, base.encoder.tokenizer, hashlib.sha256(data).hexdigest())


def text_prefix(base: TrainingBase, ids: Sequence[int], *, frozen_tokens: int = 0) -> Prefix:
    """Return a text's own keys and values as a prefix: a request reads on as if the text stood before it.

    They are at positions from 0 on. Raise InvalidRequest: the base takes no prefixes, or has an encoder.
    """
    geometry = base.geometry
    if geometry.has_encoder or not geometry.takes_prefixes:
        raise InvalidRequest(
            f"a cartridge is for a decoder alone that takes prefixes, and '{geometry.architecture}' is none",
            param="method",
        )
    starts = {Site.DECODER_SELF: keys_and_values(base, ids)[Site.DECODER_SELF]}
    layers = {Site.DECODER_SELF: geometry.layers[Site.DECODER_SELF]}
    return Prefix(TaskType.CAUSAL_LM, len(ids), layers, starts, frozen_tokens).to(base.model.device)


def new_cartridge(settings: TrainingSettings, base: TrainingBase, document: Document) -> Prefix:
    """Return the cartridge before its first step: the document's first tokens, as the paper has it.

    Raise InvalidRequest: as `text_prefix`, or the document or the base is too short for so many tokens,
    or all of them are frozen.
    """
    settings = settings.resolved(is_encoder_decoder=base.is_encoder_decoder)
    p = settings.num_virtual_tokens
    assert p is not None
    if p > len(document.ids):
        raise InvalidRequest(
            f"the document has {len(document.ids)} tokens, and a cartridge of {p} starts from its first "
            "ones; take fewer virtual tokens",
            param="num_virtual_tokens",
        )
    if p >= base.geometry.max_positions:
        raise InvalidRequest(
            f"{p} tokens leave none of the base's {base.geometry.max_positions} positions to a question",
            param="num_virtual_tokens",
        )
    frozen_tokens = settings.frozen_tokens or 0
    check_frozen(frozen_tokens, p)
    return text_prefix(base, document.ids[:p], frozen_tokens=frozen_tokens)


def _refused(path: Path, message: str) -> InvalidRequest:
    return InvalidRequest(f"{path.name}: {message}", param="document")
