"""The key file on disk: replaced whole, by one process at a time."""

import contextlib
import fcntl
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from app.keys.entries import KeyFileError, format_keys, parse_keys
from app.keys.key import Key
from app.store.bounded import read_bounded

_MODE = 0o600
MAX_FILE_BYTES = 16 << 20  # some 50,000 keys


def read_keys(path: Path) -> tuple[Key, ...]:
    """Return the keys of a file. Raises KeyFileError with the file's name, or OSError."""
    try:
        return parse_keys(read_bounded(path, MAX_FILE_BYTES))
    except KeyFileError as error:
        raise KeyFileError(f"the key file {path} can't be used: {error}") from None


def change_keys(path: Path, change: Callable[[tuple[Key, ...]], Sequence[Key]]) -> None:
    """Replace a file's keys by the result of `change`; a missing file has none.

    A reader sees the old file or the new one. Another process that changes the file waits.
    Raises KeyFileError, OSError.
    """
    path = path.resolve()  # a link stays one
    with _locked(path.parent):
        try:
            keys, existing = read_keys(path), path.stat()
        except FileNotFoundError:
            keys, existing = (), None
        _replace(path, format_keys(change(keys)), existing)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Lock the directory, since the file itself is a new one after each change."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _replace(path: Path, data: bytes, existing: os.stat_result | None) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE)
        with open(descriptor, "wb") as file:
            if existing is not None:
                _keep_readers(descriptor, existing)
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _keep_readers(descriptor: int, existing: os.stat_result) -> None:
    """Keep owner and mode, so that a server that runs as another user can read the new file too."""
    if (existing.st_uid, existing.st_gid) != (os.geteuid(), os.getegid()):
        os.fchown(descriptor, existing.st_uid, existing.st_gid)
    os.fchmod(descriptor, existing.st_mode & 0o755 & ~0o111)
