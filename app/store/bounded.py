"""Reading a file within a bound: plain files only, without waiting for anything, and never too much."""

import errno
import os
import stat
from pathlib import Path

_OPEN = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # a fifo must not block us


def read_bounded(
    path: str | Path, limit: int, *, directory: int | None = None, follow_links: bool = True
) -> bytes:
    """Return the whole file, if it is a plain one of at most `limit` bytes.

    `path` starts at an open `directory`, where one is given. Raise OSError: EFBIG where the file is larger,
    EINVAL where it is no plain one, or opening's own.
    """
    file = os.open(path, _OPEN | (0 if follow_links else os.O_NOFOLLOW), dir_fd=directory)
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a plain file")
        if found.st_size <= limit:
            with open(file, "rb", closefd=False) as stream:
                data = stream.read(found.st_size + 1)
                if len(data) > found.st_size:  # it grows, or its file system knows no sizes
                    data += stream.read(limit + 1 - len(data))
            if len(data) <= limit:
                return data
        raise OSError(errno.EFBIG, f"larger than {limit} bytes")
    finally:
        os.close(file)
