"""Disks that kill the process, crash, or keep a log: they stand where the store's system calls go through."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from app.store.disk import Disk


class WatchedDisk(Disk):
    """Calls `on_point` before and after every system call."""

    def __init__(self, on_point: Callable[[str], None]) -> None:
        self._on_point = on_point

    def _around(self, call: Callable[..., Any], *arguments: Any) -> Any:
        name = call.__name__
        self._on_point(f"before {name}")
        result = call(*arguments)
        self._on_point(f"after {name}")
        return result

    def make_directory(self, name: str, directory: int) -> None:
        self._around(super().make_directory, name, directory)

    def create(self, name: str, directory: int) -> int:
        return int(self._around(super().create, name, directory))

    def write(self, file: int, data: bytes) -> None:
        """In two halves, with a point between: a file may be torn."""
        half = len(data) // 2
        self._around(super().write, file, data[:half])
        self._around(super().write, file, data[half:])

    def sync(self, descriptor: int) -> None:
        self._around(super().sync, descriptor)

    def link(self, name: str, new_name: str, directory: int) -> None:
        self._around(super().link, name, new_name, directory)

    def rename(self, name: str, directory: int, new_name: str, new_directory: int) -> None:
        self._around(super().rename, name, directory, new_name, new_directory)

    def unlink(self, name: str, directory: int) -> None:
        self._around(super().unlink, name, directory)


class Countdown:
    """Does `act` at the n-th point; counts on."""

    def __init__(self, at: int, act: Callable[[], None]) -> None:
        self.count = 0
        self._at = at
        self._act = act

    def __call__(self, point: str) -> None:
        self.count += 1
        if self.count == self._at:
            self._act()


def killing_disk(at: int) -> Disk:
    """SIGKILL for this process at the n-th point."""
    return WatchedDisk(Countdown(at, lambda: os.kill(os.getpid(), signal.SIGKILL)))


class CrashedError(BaseException):
    """The process would be gone here: nothing that runs afterwards may count on being run."""


def crashing_disk(at: int) -> Disk:
    """The same for tests within one process: whatever is tried after the n-th point fails too."""

    def crash() -> None:
        raise CrashedError

    crashed = Countdown(at, crash)

    def point(name: str) -> None:
        crashed(name)
        if crashed.count > at:
            raise CrashedError

    return WatchedDisk(point)


@dataclass(frozen=True)
class Call:
    """One change, in terms of inodes."""

    name: str
    inode: int  # of the directory, or of the file for write and sync
    entry: str = ""
    target: int = 0
    data: bytes = b""
    new_entry: str = ""
    new_inode: int = 0


@dataclass
class RecordingDisk(Disk):
    """Does everything, and keeps a log."""

    calls: list[Call] = field(default_factory=list)

    def make_directory(self, name: str, directory: int) -> None:
        super().make_directory(name, directory)
        target = os.stat(name, dir_fd=directory).st_ino
        self.calls.append(Call("mkdir", _inode(directory), name, target))

    def create(self, name: str, directory: int) -> int:
        file = super().create(name, directory)
        self.calls.append(Call("create", _inode(directory), name, _inode(file)))
        return file

    def write(self, file: int, data: bytes) -> None:
        super().write(file, data)
        self.calls.append(Call("write", _inode(file), data=data))

    def sync(self, descriptor: int) -> None:
        super().sync(descriptor)
        self.calls.append(Call("sync", _inode(descriptor)))

    def link(self, name: str, new_name: str, directory: int) -> None:
        super().link(name, new_name, directory)
        target = os.stat(new_name, dir_fd=directory).st_ino
        self.calls.append(Call("link", _inode(directory), new_name, target))

    def unlink(self, name: str, directory: int) -> None:
        super().unlink(name, directory)
        self.calls.append(Call("unlink", _inode(directory), name))


def _inode(descriptor: int) -> int:
    return os.fstat(descriptor).st_ino
