"""Files that appear whole or not at all, and stay when the power fails.

One primitive, `put_if_absent`: a temporary file, fsynced, linked to its name, directory fsynced.
A good file is never rewritten; a damaged or unused one can be quarantined. Symbolic links
below the root are not followed.
"""

import errno
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

from app.errors import CorruptData, PromptplexError, StoreFull, Unavailable
from app.store.bounded import read_bounded
from app.store.disk import Disk

_T = TypeVar("_T")

Name = tuple[str, ...]  # path components below the root
TICK_SECONDS = 2.0  # the coarsest clock of a file system in use


class Stamp(NamedTuple):
    """The state of a directory: it changes, within a tick of the clock, when a name comes or goes."""

    directory: int
    nanoseconds: int

    @property
    def is_settled(self) -> bool:
        """Return whether any later change will have another stamp, however coarse the file system's clock."""
        return time.time() - self.nanoseconds / 1e9 > TICK_SECONDS


TEMPORARY_PREFIX = ".tmp-"
QUARANTINE = "quarantine"
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR)
_BUSY = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EINTR)
_WRITE_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "it exceeds the size that a file may have here",
    errno.EROFS: "it is read-only",
    errno.EACCES: "it is read-only for this server",
    errno.EPERM: "its file system does not allow writing or hard links",
    errno.ENOTSUP: "its file system has no hard links",
}


class DurableFiles:
    """Files under one directory. Thread-safe; holds no lock across I/O.

    Reading methods may raise CorruptData and Unavailable, writing ones StoreFull as well.
    """

    def __init__(self, root: Path, disk: Disk | None = None) -> None:
        self._root, self._prefix = root, str(root)
        self._disk = disk or Disk()
        self._durable: set[Name] = set()  # directories with their own entries known to be on disk
        self._lock = threading.Lock()

    def put_if_absent(self, name: Name, data: bytes) -> bool:
        """Make `data` durable under `name`. Return False where the name is taken, durably, already."""

        def put(directory: int) -> bool:
            created = self._link_new(directory, name[-1], data)
            self._disk.sync(directory)  # also when we lost: the winner may not have come to it yet
            return created

        return self._write(name[:-1], put)

    def sync(self, name: Name) -> None:
        """Return when a name that another process put is durable."""
        try:  # a read-only store has it on disk
            self._in_directory(name[:-1], self._disk.sync)
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise write_error(error) from error

    def mark(self, name: Name) -> None:
        """Make an empty file durable under `name`; one that is there already is fine."""

        def make(directory: int) -> None:
            with suppress(FileExistsError):
                os.close(self._disk.create(name[-1], directory))
            self._disk.sync(directory)

        self._write(name[:-1], make)

    def read(self, name: Name, limit: int) -> bytes | None:
        """Return the whole file, or None. Raise CorruptData where it exceeds `limit` bytes."""
        try:
            with self._directory(name[:-1]) as directory:
                return read_bounded(name[-1], limit, directory=directory, follow_links=False)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return None
            raise _read_error(error, name) from error

    def exists(self, name: Name) -> bool:
        """Return whether there is such a file; exact, whichever process has put it."""
        try:  # one `lstat`: exact across processes on a local file system
            os.lstat(self._path(name))
        except OSError as error:
            if error.errno in _NOT_THERE:
                return False
            raise _read_error(error, name) from error
        return True

    def names(self, name: Name) -> list[str]:
        """Return the names in a directory, without unfinished files; none where there is no directory."""
        try:
            with self._directory(name) as directory:
                return [entry for entry in os.listdir(directory) if not entry.startswith(TEMPORARY_PREFIX)]
        except OSError as error:
            if error.errno == errno.ENOENT:
                return []
            raise _read_error(error, name) from error

    def stamp(self, name: Name) -> Stamp | None:
        """Return the stamp of a directory now; None where there is none, or it can't be looked at."""
        try:
            found = os.stat(self._path(name))
        except OSError:
            return None
        return Stamp(found.st_ino, found.st_mtime_ns)

    def quarantine(self, name: Name) -> Name | None:
        """Move a file to the quarantine. Return its name there; None where there is no such file."""
        aside = (QUARANTINE, f"{'-'.join(name)}.{secrets.token_hex(4)}")  # says where it was

        def move(quarantine: int) -> None:
            with self._directory(name[:-1]) as directory:
                with suppress(FileNotFoundError):  # another process was faster
                    self._disk.rename(name[-1], directory, aside[-1], quarantine)
                self._disk.sync(quarantine)
                self._disk.sync(directory)

        if not self.exists(name):
            return None
        self._write((QUARANTINE,), move)
        return aside if self.exists(aside) else None

    def replace(self, name: Name, data: bytes) -> None:
        """Put good bytes in the place of damaged ones, atomically."""

        def swap(directory: int) -> None:
            temporary = self._write_temporary(directory, data)
            self._disk.rename(temporary, directory, name[-1], directory)
            self._disk.sync(directory)

        self._write(name[:-1], swap)

    def touch(self, name: Name) -> None:
        """Set a file's age to 0, so that it isn't collected as garbage; nothing happens where that fails."""
        with suppress(OSError), self._directory(name[:-1]) as directory:
            os.utime(name[-1], dir_fd=directory, follow_symlinks=False)

    def touch_directory(self, name: Name) -> None:
        """Give a directory, made where it isn't there, another stamp; nothing happens where that fails."""
        with suppress(OSError):
            try:
                os.utime(self._path(name))
            except FileNotFoundError:
                os.makedirs(self._path(name), exist_ok=True)

    def age(self, name: Name) -> float | None:
        """Return the seconds since the file was put or touched; None where there is no such file."""
        try:
            return time.time() - os.lstat(self._path(name)).st_mtime
        except OSError as error:
            if error.errno in _NOT_THERE:
                return None
            raise _read_error(error, name) from error

    def remove(self, name: Name) -> None:
        """Remove a file of the quarantine; one that is gone already is fine."""
        try:
            with suppress(FileNotFoundError), self._directory(name[:-1]) as directory:
                self._disk.unlink(name[-1], directory)
        except OSError as error:
            raise write_error(error) from error

    def remove_leftovers(self, name: Name, older_than: float) -> int:
        """Remove unfinished files of a directory that are older, in seconds. Return how many."""
        try:
            with self._directory(name) as directory:
                unfinished = [entry for entry in os.listdir(directory) if entry.startswith(TEMPORARY_PREFIX)]
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise _read_error(error, name) from error
        old = [entry for entry in unfinished if (self.age((*name, entry)) or 0.0) > older_than]
        for entry in old:
            self.remove((*name, entry))
        return len(old)

    def _path(self, name: Name) -> str:
        return "/".join((self._prefix, *name))

    def _write(self, name: Name, work: Callable[[int], _T]) -> _T:
        """Run `_in_directory`, again where a directory that we had made is gone. Raise our own errors."""
        try:
            try:
                return self._in_directory(name, work)
            except FileNotFoundError:
                with self._lock:
                    self._durable.clear()
                return self._in_directory(name, work)
        except OSError as error:
            raise write_error(error) from error

    def _in_directory(self, name: Name, work: Callable[[int], _T]) -> _T:
        """Call `work` with the descriptor of a directory, made where it isn't there. Raise OSError."""
        self._make_directories(name)
        with self._directory(name) as directory:
            return work(directory)

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
        if not self._durable:
            self._make_root()
        for depth, part in enumerate(name):
            with self._directory(name[:depth]) as directory:
                with suppress(FileExistsError):
                    self._disk.make_directory(part, directory)
                self._disk.sync(directory)
        with self._lock:
            self._durable.add(name)

    def _make_root(self) -> None:
        """Make the root, and sync it: another process may have made it and died before it could."""
        self._root.mkdir(parents=True, exist_ok=True)
        for parent in self._root.resolve().parents:
            with suppress(OSError):
                self._sync_directory(parent)

    def _sync_directory(self, path: Path) -> None:
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._disk.sync(directory)
        finally:
            os.close(directory)

    def _link_new(self, directory: int, name: str, data: bytes) -> bool:
        """Write a temporary file, sync it, link it to `name`; the temporary file goes in any case."""
        temporary = self._write_temporary(directory, data)
        try:
            self._disk.link(temporary, name, directory)
            return True
        except FileExistsError:
            return False
        finally:
            with suppress(OSError):
                self._disk.unlink(temporary, directory)

    def _write_temporary(self, directory: int, data: bytes) -> str:
        """Write a synced file under a name that no reader looks at; it is gone again where that fails."""
        temporary = f"{TEMPORARY_PREFIX}{os.getpid()}-{secrets.token_hex(8)}"
        file = self._disk.create(temporary, directory)
        try:
            self._disk.write(file, data)
            self._disk.sync(file)
        except OSError:
            with suppress(OSError):
                self._disk.unlink(temporary, directory)
            raise
        finally:
            os.close(file)
        return temporary


def write_error(error: OSError) -> PromptplexError:
    """Return the error of an upload, or of a change, that could not be written."""
    if error.errno in _BUSY:
        return Unavailable("The store can't be written to just now: the server is short of files or memory")
    if error.errno in (errno.ELOOP, errno.ENOTDIR):
        return CorruptData("A directory of the store is not a directory; symbolic links are not followed")
    reason = _WRITE_ERRORS.get(error.errno or 0, "the disk reported an error")
    return StoreFull(f"The store can't take the upload: {reason}. Nothing was acknowledged")


def _read_error(error: OSError, name: Name) -> PromptplexError:
    if error.errno in _BUSY:
        return Unavailable("The store can't be read just now: the server is short of files or memory")
    what = "/".join(name)
    if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.EINVAL):
        return CorruptData(f"{what} of the store is not a plain file; symbolic links are not followed")
    if error.errno == errno.EFBIG:
        return CorruptData(f"{what} of the store is damaged: it is {error.strerror}")
    return CorruptData(f"{what} of the store can't be read")
