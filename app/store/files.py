"""Files that appear whole or not at all, and stay when the power fails.

One primitive, `put_if_absent`: a temporary file, fsynced, linked to its name, directory fsynced.
Nothing is ever rewritten or removed but temporary files. Symbolic links below the root are not
followed. An object store with conditional puts can offer the same five methods.
"""

import errno
import os
import secrets
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from app.errors import CorruptData, PromptplexError, StoreFull, Unavailable

Name = tuple[str, ...]  # path components below the root

TEMPORARY_PREFIX = ".tmp-"
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a fifo must not block us
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR)
_BUSY = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EINTR)
_WRITE_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "it is read-only",
    errno.EACCES: "it is read-only for this server",
    errno.EPERM: "its file system does not allow writing or hard links",
    errno.ENOTSUP: "its file system has no hard links",
}


class DurableFiles:
    """Write-once files under one directory. Thread-safe; holds no lock across I/O."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._durable: set[Name] = set()  # directories whose own entries are known to be on disk
        self._lock = threading.Lock()

    def put_if_absent(self, name: Name, data: bytes) -> bool:
        """Make `data` durable under `name`; False where the name is taken already.

        Either way the name is on disk when this returns. Raises StoreFull where the disk can't
        promise that.
        """
        try:
            self._make_directories(name[:-1])
            with self._directory(name[:-1]) as directory:
                created = _link_new(directory, name[-1], data)
                os.fsync(directory)  # also when we lost: the winner may not have come to it yet
                return created
        except OSError as error:
            raise _write_error(error) from error

    def sync(self, name: Name) -> None:
        """Return when a name that somebody else linked is on disk. A read-only store has it."""
        try:
            self._make_directories(name[:-1])
            with self._directory(name[:-1]) as directory:
                os.fsync(directory)
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise _write_error(error) from error

    def read(self, name: Name) -> bytes | None:
        """The whole file, or None where there is none. Raises CorruptData, Unavailable."""
        try:
            with self._directory(name[:-1]) as directory:
                return _read_whole(os.open(name[-1], _READ, dir_fd=directory))
        except OSError as error:
            if error.errno == errno.ENOENT:
                return None
            raise _read_error(error, name) from error

    def exists(self, name: Name) -> bool:
        """One `lstat`: exact across processes on a local file system."""
        try:
            os.lstat(self._root.joinpath(*name))
        except OSError as error:
            if error.errno in _NOT_THERE:
                return False
            raise _read_error(error, name) from error
        return True

    def names(self, name: Name) -> list[str]:
        """Names in a directory, without temporary files; none where there is no such directory."""
        try:
            with self._directory(name) as directory:
                return [entry for entry in os.listdir(directory) if not entry.startswith(TEMPORARY_PREFIX)]
        except OSError as error:
            if error.errno == errno.ENOENT:
                return []
            raise _read_error(error, name) from error

    @contextmanager
    def _directory(self, name: Name) -> Iterator[int]:
        """Open component by component, so that no link in the middle is followed."""
        # The root itself may be a link: that is the operator's business.
        directory = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for part in name:
                inner = os.open(part, _OPEN_DIRECTORY, dir_fd=directory)
                os.close(directory)
                directory = inner
            yield directory
        finally:
            os.close(directory)

    def _make_directories(self, name: Name) -> None:
        """Make the directories of `name`; on disk themselves, once per process, when this returns."""
        if name in self._durable:
            return
        self._make_root()
        for depth, part in enumerate(name):
            with self._directory(name[:depth]) as directory:
                with suppress(FileExistsError):
                    os.mkdir(part, dir_fd=directory)
                os.fsync(directory)
        with self._lock:
            self._durable.add(name)

    def _make_root(self) -> None:
        if self._root.is_dir():
            return
        self._root.mkdir(parents=True, exist_ok=True)
        for parent in self._root.resolve().parents:  # whichever of them are new
            with suppress(OSError):
                _sync_directory(parent)


def _sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _link_new(directory: int, name: str, data: bytes) -> bool:
    """Write a temporary file, fsync it, link it to `name`; the temporary file goes in any case."""
    temporary = f"{TEMPORARY_PREFIX}{os.getpid()}-{secrets.token_hex(8)}"
    file = os.open(temporary, _CREATE, 0o644, dir_fd=directory)
    try:
        try:
            _write_all(file, data)
            os.fsync(file)
        finally:
            os.close(file)
        os.link(temporary, name, src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=False)
        return True
    except FileExistsError:
        return False
    finally:
        with suppress(OSError):
            os.unlink(temporary, dir_fd=directory)


def _read_whole(file: int) -> bytes:
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise OSError(errno.ENOTDIR, "not a plain file")
        with open(file, "rb", closefd=False) as stream:
            return stream.read()
    finally:
        os.close(file)


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _write_error(error: OSError) -> PromptplexError:
    if error.errno in (errno.ELOOP, errno.ENOTDIR):
        return CorruptData("A directory of the store is not a directory; symbolic links are not followed")
    reason = _WRITE_ERRORS.get(error.errno or 0, "the disk reported an error")
    return StoreFull(f"The store can't take the upload: {reason}. Nothing was acknowledged")


def _read_error(error: OSError, name: Name) -> PromptplexError:
    if error.errno in _BUSY:
        return Unavailable("The store can't be read just now: the server is short of files or memory")
    what = "/".join(name)
    if error.errno in (errno.ELOOP, errno.ENOTDIR):
        return CorruptData(f"{what} of the store is not a plain file; symbolic links are not followed")
    return CorruptData(f"{what} of the store can't be read")
