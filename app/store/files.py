"""Files that appear whole or not at all, and stay when the power fails.

One primitive, `put_if_absent`: a temporary file, fsynced, linked to its name, directory fsynced.
A good file is never rewritten; what is damaged, or was never of use, can be set aside. Symbolic links
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
from typing import NamedTuple, Protocol, TypeVar

from app.errors import CorruptData, PromptplexError, StoreFull, Unavailable
from app.store.bounded import read_bounded
from app.store.disk import Disk

_T = TypeVar("_T")

Name = tuple[str, ...]  # path components below the root


TICK_SECONDS = 2.0  # the coarsest clock of a file system in use


class Stamp(NamedTuple):
    """How a directory looks: another way, within a tick of the clock, when a name comes or goes."""

    directory: int
    nanoseconds: int

    @property
    def is_settled(self) -> bool:
        """Whether a change from now on would have another stamp, however coarse the file system's clock."""
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


class WriteOnceFiles(Protocol):
    """What the store stands on. An object store with conditional puts can offer it too.

    Reading methods may raise CorruptData and Unavailable, writing ones StoreFull as well.
    """

    def put_if_absent(self, name: Name, data: bytes) -> bool:
        """Make `data` durable under `name`; False where the name is taken, durably, already."""
        ...

    def sync(self, name: Name) -> None:
        """Return when a name that somebody else put is durable."""
        ...

    def mark(self, name: Name) -> None:
        """Make an empty file durable under `name`; one that is there already is fine."""
        ...

    def read(self, name: Name, limit: int) -> bytes | None:
        """The whole file, or None where there is none; CorruptData where it exceeds `limit` bytes."""
        ...

    def exists(self, name: Name) -> bool:
        """Exact: what any process has put is seen by all."""
        ...

    def names(self, name: Name) -> list[str]:
        """What lies in a directory; nothing where there is no such directory."""
        ...

    def stamp(self, name: Name) -> Stamp | None:
        """How a directory looks now; None where there is none, or that can't be told."""
        ...

    def quarantine(self, name: Name) -> Name | None:
        """Move a file to the quarantine and return where it lies now; None where there is no such file."""
        ...

    def replace(self, name: Name, data: bytes) -> None:
        """Put good bytes in the place of damaged ones, atomically."""
        ...

    def touch(self, name: Name) -> None:
        """Make the file young again; nothing happens where it can't be done."""
        ...

    def touch_directory(self, name: Name) -> None:
        """Give a directory, made where it isn't there, another stamp; nothing happens where that fails."""
        ...

    def age(self, name: Name) -> float | None:
        """Seconds since the file was put or touched; None where there is no such file."""
        ...

    def remove(self, name: Name) -> None:
        """Take a file away. Only for what was set aside."""
        ...

    def remove_leftovers(self, name: Name, older_than: float) -> int:
        """Remove unfinished files of a directory that are older, in seconds; how many it were."""
        ...


class DurableFiles:
    """WriteOnceFiles under one directory. Thread-safe; holds no lock across I/O."""

    def __init__(self, root: Path, disk: Disk | None = None) -> None:
        self._root, self._prefix = root, str(root)
        self._disk = disk or Disk()
        self._durable: set[Name] = set()  # directories whose own entries are known to be on disk
        self._lock = threading.Lock()

    def put_if_absent(self, name: Name, data: bytes) -> bool:
        """Make `data` durable under `name`; False where the name is taken already.

        Either way the name is on disk when this returns. Raises StoreFull where the disk can't
        promise that.
        """

        def put() -> bool:
            self._make_directories(name[:-1])
            with self._directory(name[:-1]) as directory:
                created = self._link_new(directory, name[-1], data)
                self._disk.sync(directory)  # also when we lost: the winner may not have come to it yet
                return created

        return self._write(put)

    def sync(self, name: Name) -> None:
        """Return when a name that somebody else linked is on disk. A read-only store has it."""
        try:
            self._make_directories(name[:-1])
            with self._directory(name[:-1]) as directory:
                self._disk.sync(directory)
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise write_error(error) from error

    def mark(self, name: Name) -> None:
        """Make an empty file durable under `name`; one that is there already is fine."""

        def make() -> None:
            self._make_directories(name[:-1])
            with self._directory(name[:-1]) as directory:
                with suppress(FileExistsError):
                    os.close(self._disk.create(name[-1], directory))
                self._disk.sync(directory)

        self._write(make)

    def read(self, name: Name, limit: int) -> bytes | None:
        """The whole file, or None where there is none. Raises CorruptData, Unavailable."""
        try:
            with self._directory(name[:-1]) as directory:
                return read_bounded(name[-1], limit, directory=directory, follow_links=False)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return None
            raise _read_error(error, name) from error

    def exists(self, name: Name) -> bool:
        """One `lstat`: exact across processes on a local file system."""
        try:
            os.lstat(self._path(name))
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

    def stamp(self, name: Name) -> Stamp | None:
        """One `stat`: how a directory looks now; None where there is none, or it can't be looked at."""
        try:
            found = os.stat(self._path(name))
        except OSError:
            return None
        return Stamp(found.st_ino, found.st_mtime_ns)

    def quarantine(self, name: Name) -> Name | None:
        """Move a file to the quarantine, under a name that says where it was; None: no such file."""
        aside = (QUARANTINE, f"{'-'.join(name)}.{secrets.token_hex(4)}")

        def move() -> None:
            self._make_directories((QUARANTINE,))
            with self._directory(name[:-1]) as directory, self._directory((QUARANTINE,)) as quarantine:
                with suppress(FileNotFoundError):  # somebody else was faster
                    self._disk.rename(name[-1], directory, aside[-1], quarantine)
                self._disk.sync(quarantine)
                self._disk.sync(directory)

        if not self.exists(name):
            return None
        self._write(move)
        return aside if self.exists(aside) else None

    def replace(self, name: Name, data: bytes) -> None:
        """Put good bytes in the place of damaged ones, atomically."""

        def swap() -> None:
            self._make_directories(name[:-1])
            with self._directory(name[:-1]) as directory:
                temporary = self._write_temporary(directory, data)
                self._disk.rename(temporary, directory, name[-1], directory)
                self._disk.sync(directory)

        self._write(swap)

    def touch(self, name: Name) -> None:
        """Make the file young again, so that nobody takes it for debris; a read-only store has none."""
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
        """Seconds since the file was put or touched; None where there is no such file."""
        try:
            return time.time() - os.lstat(self._path(name)).st_mtime
        except OSError as error:
            if error.errno in _NOT_THERE:
                return None
            raise _read_error(error, name) from error

    def remove(self, name: Name) -> None:
        """Take a file away; one that is gone already is fine."""
        try:
            with suppress(FileNotFoundError), self._directory(name[:-1]) as directory:
                self._disk.unlink(name[-1], directory)
        except OSError as error:
            raise write_error(error) from error

    def remove_leftovers(self, name: Name, older_than: float) -> int:
        """Remove temporary files that a crash left behind and that are older, in seconds."""
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

    def _write(self, work: Callable[[], _T]) -> _T:
        """Errors become ours; where a directory that we had made is gone, once more from the start."""
        try:
            try:
                return work()
            except FileNotFoundError:
                with self._lock:
                    self._durable.clear()
                return work()
        except OSError as error:
            raise write_error(error) from error

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
        """Make the root, and make sure of it: whoever else made it may have died before that."""
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
        """A synced file under a name that nobody looks at; gone again where that fails."""
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
    """What a failed write of an upload's bytes means for whoever uploads."""
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
