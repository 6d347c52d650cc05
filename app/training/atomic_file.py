"""Files that are replaced whole: a reader, or the next start after a kill, sees the old bytes or the new."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from app.errors import StoreFull


def replace_file(path: Path, data: bytes, *, before: Path | None = None) -> None:
    """Put `data` in the place of a file, durably; the file that was there is moved to `before`, if given.

    Raise StoreFull where it can't be written; the file stays as it was then.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path.name):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        if before is not None and path.exists():
            os.replace(path, before)
        os.replace(temporary, path)
        _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextlib.contextmanager
def writing(name: str) -> Iterator[None]:
    """Say in words which file of a run can't be written, and why."""
    try:
        yield
    except OSError as error:
        raise StoreFull(
            f"can't write {name} of the training run ({error.strerror}); make room or choose another --out"
        ) from error
