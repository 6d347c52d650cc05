"""How a store changes a file system: one method for each system call that matters.

Everything that must survive a power failure goes through here, so that a test can stand in between:
kill the process before or after any of these calls, or keep a log of them and lose what was not
synced.
"""

import os

_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Disk:
    """The calls themselves. `directory` is an open directory's descriptor. All may raise OSError."""

    def make_directory(self, name: str, directory: int) -> None:
        """Make a directory, which is not durable before the one around it is synced."""
        os.mkdir(name, dir_fd=directory)

    def create(self, name: str, directory: int) -> int:
        """Open a new file for writing. Raise FileExistsError where the name is taken."""
        return os.open(name, _CREATE, 0o644, dir_fd=directory)

    def write(self, file: int, data: bytes) -> None:
        """Write all of `data`."""
        view = memoryview(data)
        while view:
            view = view[os.write(file, view) :]

    def sync(self, descriptor: int) -> None:
        """Return when a file's bytes, or a directory's names, are on disk."""
        os.fsync(descriptor)

    def link(self, name: str, new_name: str, directory: int) -> None:
        """Give a file a second name. Raise FileExistsError where it is taken."""
        os.link(name, new_name, src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=False)

    def rename(self, name: str, directory: int, new_name: str, new_directory: int) -> None:
        """Rename a file atomically; one that had the new name is gone."""
        os.rename(name, new_name, src_dir_fd=directory, dst_dir_fd=new_directory)

    def unlink(self, name: str, directory: int) -> None:
        """Take a name away."""
        os.unlink(name, dir_fd=directory)
