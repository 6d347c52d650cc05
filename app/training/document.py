"""The document of a cartridge: its ids, parts of it, and the keys and values that a cartridge starts from."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from app.errors import InvalidRequest
from app.prompt import TaskType
from app.sites import Site
from app.text.template import PLAIN
from app.training.base import TrainingBase
from app.training.prompts.prefix import Prefix
from app.training.prompts.starts import keys_and_values
from app.training.settings import TrainingSettings

MAX_DOCUMENT_BYTES = 1 << 26


@dataclass(frozen=True, slots=True)
class Document:
    """A text as the base reads it: what all its texts begin with (BOS, or nothing), then its own ids."""

    beginning: tuple[int, ...]
    text_ids: tuple[int, ...]
    digest: str  # sha256 (hex) of the file

    @property
    def ids(self) -> tuple[int, ...]:
        return (*self.beginning, *self.text_ids)

    def chunk(self, first: int, size: int) -> tuple[int, ...]:
        """Return a part as a text of its own: `size` ids of the text from number `first` on."""
        return (*self.beginning, *self.text_ids[first : first + size])

    def chunks(self, number: int, size: int) -> Iterator[tuple[int, ...]]:
        """Yield so many parts of the same size, evenly spread; they overlap, or repeat, as they must."""
        room = max(0, len(self.text_ids) - size)
        for index in range(number):
            yield self.chunk(round(room * index / max(1, number - 1)), size)

    def without_beginning(self, source: tuple[int, ...]) -> tuple[int, ...]:
        """Return the ids of a request as they stand behind the document: it begins there no second time."""
        count = len(self.beginning)
        return source[count:] if source[:count] == self.beginning else source


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
    return make_document(text, base, hashlib.sha256(data).hexdigest())


def make_document(text: str, base: TrainingBase, digest: str = "") -> Document:
    """Return the document of a text."""
    tokenizer = base.encoder.tokenizer
    return Document(tokenizer.leading_ids(PLAIN), tokenizer.plain_ids(text), digest)


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

    Raise InvalidRequest: as `text_prefix`, or the document or the base is too short for so many tokens.
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
    return text_prefix(base, document.ids[:p], frozen_tokens=settings.frozen_tokens or 0)


def _refused(path: Path, message: str) -> InvalidRequest:
    return InvalidRequest(f"{path.name}: {message}", param="document")
