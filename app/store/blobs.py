"""Canonical prompts by the sha256 of their bytes. A file that no longer hashes to its name is quarantined."""

import hashlib
import logging
import re
from contextlib import suppress

from app.errors import CorruptData, InvalidRequest, PromptplexError, PromptRejected, StoreFull
from app.store.files import DurableFiles, Name

_log = logging.getLogger(__name__)
_DIGEST = re.compile(r"[0-9a-f]{64}")
_SUFFIX = ".safetensors"
FOLDER = "blobs"
MAX_BLOB_BYTES = 1 << 30  # a prefix of 200 tokens of a 65B model in float32


class Blobs:
    """The folder of blobs. Thread-safe; any number of processes may share it."""

    def __init__(self, files: DurableFiles) -> None:
        self._files = files

    def put(self, digest: str, data: bytes) -> None:
        """Make a blob, the sha256 of which the caller knows, durable.

        One that is there already is verified, and made young again. Raise PromptRejected where `data`
        exceeds MAX_BLOB_BYTES.
        """
        if len(data) > MAX_BLOB_BYTES:
            raise PromptRejected(
                "The prompt is too large for the store",
                expected=f"at most {MAX_BLOB_BYTES} bytes",
                found=f"{len(data)} bytes",
            )
        name = blob_name(digest)
        if not self._files.exists(name) and self._files.put_if_absent(name, data):
            return
        self._files.touch(name)
        if self._is_good(name, digest):
            self._files.sync(name)
        else:
            self._quarantine(name, digest)
            self._files.put_if_absent(name, data)
            if not self._is_good(name, digest):
                raise StoreFull(
                    f"Prompt {digest} is damaged in the store and can't be replaced. Nothing was acknowledged"
                )

    def read(self, digest: str) -> bytes:
        """Return verified bytes. Raise CorruptData; damaged ones are in the quarantine then."""
        name = blob_name(digest)
        data = self._files.read(name, MAX_BLOB_BYTES)
        if data is None:
            raise CorruptData(f"Prompt {digest} is not in the store; upload it again")
        if _hashes_to(data, digest):
            return data
        self._quarantine(name, digest)
        if (data := self.read_good(name, digest)) is not None:
            return data  # another process healed it meanwhile
        raise CorruptData(
            f"Prompt {digest} is damaged: its bytes do not hash to its name; upload the prompt again"
        )

    def heal(self, digest: str, data: bytes) -> bool:
        """Put good bytes back where they are missing or damaged. Return whether that was needed."""
        if not _hashes_to(data, digest):
            raise CorruptData(f"These are not the bytes of prompt {digest}")
        name = blob_name(digest)
        if self._is_good(name, digest):
            return False
        self.put(digest, data)
        _log.warning("prompt %s was missing or damaged in the store; it is there again", digest)
        return True

    def exists(self, digest: str) -> bool:
        """Return whether there is such a file, whatever it holds."""
        return self._files.exists(blob_name(digest))

    def digests(self) -> list[str]:
        """Return the digests of all blobs, sorted."""
        names = (
            name.removesuffix(_SUFFIX) for name in self._files.names((FOLDER,)) if name.endswith(_SUFFIX)
        )
        return sorted(name for name in names if _DIGEST.fullmatch(name))

    def read_good(self, name: Name, digest: str) -> bytes | None:
        """Return the bytes of any file that hash to `digest`; None where they don't, or can't be read."""
        try:
            data = self._files.read(name, MAX_BLOB_BYTES)
        except CorruptData:  # no plain file, or too large a one
            return None
        return data if data is not None and _hashes_to(data, digest) else None

    def _is_good(self, name: Name, digest: str) -> bool:
        return self.read_good(name, digest) is not None

    def _quarantine(self, name: Name, digest: str) -> None:
        """Move it to the quarantine, and back where it is good after all: another process was faster."""
        with suppress(PromptplexError):  # a read-only store keeps damaged files where they are
            aside = self._files.quarantine(name)
            moved = None if aside is None else self.read_good(aside, digest)
            if moved is not None:
                self._files.put_if_absent(name, moved)
            elif aside is not None:
                _log.error("prompt %s is damaged in the store: quarantined as %s", digest, "/".join(aside))


def blob_name(digest: str) -> Name:
    """Return where the blob lies. Raise InvalidRequest where that is no digest."""
    if not _DIGEST.fullmatch(digest):
        raise InvalidRequest("A prompt digest is 64 hex digits", param="digest")
    return (FOLDER, f"{digest}{_SUFFIX}")


def _hashes_to(data: bytes, digest: str) -> bool:
    return hashlib.sha256(data).hexdigest() == digest
