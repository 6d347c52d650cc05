"""The keys that are valid now: the key file, read again whenever it has changed."""

import hmac
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from app.keys.entries import KeyFileError
from app.keys.key import Key, hash_of, is_key_text
from app.keys.key_file import read_keys
from app.keys.quotas import Quotas

log = logging.getLogger("promptplex.keys")

_Stamp = tuple[int, ...] | str  # how the file looked, or why it couldn't be looked at


class Keyring:
    """Check the file at each lookup (one `stat`), so that a removed key's next request fails."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Raise KeyFileError with a message for the operator if the file can't be used."""
        self._path = path
        self._quotas = Quotas(clock)
        self._by_hash: dict[str, Key] = {}
        self._by_name: dict[str, Key] = {}
        self._stamp: _Stamp = ""
        self._complained: _Stamp = ""
        try:
            self._load()
        except FileNotFoundError:
            raise KeyFileError(
                f"there is no key file {path}; "
                f"`promptplex keys add NAME --scope generate --keys-file {path}` makes one"
            ) from None
        except OSError as error:
            raise KeyFileError(f"the key file {path} can't be read: {error.strerror}") from None

    def __len__(self) -> int:
        return len(self._by_hash)

    def find(self, text: str) -> Key | None:
        """Return the key with this text, as the file is now."""
        self._refresh()
        if not is_key_text(text):
            return None
        digest = hash_of(text)
        key = self._by_hash.get(digest)
        return key if key is not None and hmac.compare_digest(key.sha256, digest) else None

    def take(self, key: Key, *, needs_tokens: bool) -> None:
        """Count a request against the key's quotas. Raises RateLimited."""
        self._quotas.take(key, needs_tokens=needs_tokens)

    def check_tokens(self, key: Key) -> None:
        """Raise RateLimited if the key has used more tokens than its quota allows."""
        self._quotas.check_tokens(key)

    def charge(self, name: str, num_tokens: int) -> None:
        """Count the tokens of an answer against the quota of the key with this name, if there is one."""
        key = self._by_name.get(name)
        if key is not None:
            self._quotas.charge(key, num_tokens)

    def _refresh(self) -> None:
        """A missing file means no keys; one that can't be used leaves the keys as they were."""
        try:
            if _stamp(self._path) == self._stamp:
                return
            self._load()
            log.info("%d keys in %s", len(self), self._path)
        except (FileNotFoundError, NotADirectoryError):
            self._by_hash = {}  # what was used stays known: the file may be back in a moment
            self._stamp = ""
            self._complain("gone", "the key file %s is gone: no key is valid until it is back", self._path)
        except OSError as error:
            reason = error.strerror or "unreadable"
            self._complain(
                reason, "the key file %s can't be read: %s; keys stay as they were", self._path, reason
            )
        except KeyFileError as error:
            self._complain(self._stamp, "%s; keys stay as they were", error)

    def _load(self) -> None:
        """Take the stamp first: a write after it is noticed the next time."""
        stamp = _stamp(self._path)
        try:
            keys = read_keys(self._path)
        except KeyFileError:
            self._stamp = stamp  # it stays malformed until it changes
            raise
        self._stamp, self._complained = stamp, ""
        self._by_hash = {key.sha256: key for key in keys}
        self._by_name = {key.name: key for key in keys}
        self._quotas.keep(self._by_name)

    def _complain(self, about: _Stamp, message: str, *arguments: object) -> None:
        """Once per change, not once per request."""
        if about != self._complained:
            self._complained = about
            log.error(message, *arguments)


def _stamp(path: Path) -> tuple[int, ...]:
    found = os.stat(path)
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
