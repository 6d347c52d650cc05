"""Runs on disk: a directory for each, below the store's. Replicas of one store share them.

A run's server holds a lock on it as long as it lives, so that every replica sees whether an unfinished run
still goes on. Cancelling is a file too: the server that has the run looks for it.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from app.errors import CorruptData, NotFound, Unavailable
from app.serving.training_runs.records import (
    RunRecord,
    RunState,
    dump_record,
    is_run_id,
    new_run_id,
    parse_record,
)
from app.store.bounded import read_bounded
from app.store.files import write_error

_log = logging.getLogger(__name__)
MAX_KEPT = 50  # runs that have ended
MAX_KEPT_BYTES = 2 << 30  # of their directories, together
_MAX_RECORD_BYTES = 4 << 20
DATA, LOG = "data", "output.log"
_RECORD, _LOCK, _CANCEL, _OUTPUT = "run.json", "lock", "cancel", "out"
_NEW = ".new-"  # begins the name of a directory that isn't complete
_MAX_FILL_SECONDS = 3600  # in which it is: its data is here already


class RunFiles:
    """The directory of one run, held by this process."""

    def __init__(self, root: Path, record: RunRecord, lock: int) -> None:
        self.path = root / record.id
        self.record = record
        self._lock = lock

    @property
    def data(self) -> Path:
        """The directory of the uploaded files."""
        return self.path / DATA

    @property
    def output(self) -> Path:
        """The directory that the command writes."""
        return self.path / _OUTPUT

    @property
    def log(self) -> Path:
        """The file of the command's output."""
        return self.path / LOG

    @property
    def is_cancelled(self) -> bool:
        """Whether any replica was asked to cancel it."""
        return (self.path / _CANCEL).exists()

    def write(self, record: RunRecord) -> None:
        """Replace the record. A disk that is full leaves the old one, which is logged."""
        self.record = record
        try:
            _write(self.path, record)
        except OSError:
            _log.exception("the record of training run %s can't be written", record.id)

    def end(self, record: RunRecord) -> None:
        """Remove the data, then write the record, which nothing follows."""
        shutil.rmtree(self.data, ignore_errors=True)
        self.write(record)

    def close(self) -> None:
        """Let go of the run."""
        os.close(self._lock)


class RunDirectory:
    """All runs of a store. Every method may wait for the disk. Thread-safe."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def create(self, record: RunRecord, fill: Callable[[Path], None]) -> RunFiles:
        """Make a run's directory, with its data from `fill`; it appears whole.

        Raise StoreFull, Unavailable.
        """
        new = self._root / f"{_NEW}{record.id}"
        with contextlib.ExitStack() as undo:
            undo.callback(shutil.rmtree, new, ignore_errors=True)
            try:
                (new / DATA).mkdir(parents=True, mode=0o700)
                lock = _locked(new / _LOCK)
                undo.callback(os.close, lock)
                fill(new / DATA)
                _write(new, record)
                new.rename(self._root / record.id)
            except OSError as error:
                raise write_error(error) from error
            undo.pop_all()
        return RunFiles(self._root, record, lock)

    @contextlib.contextmanager
    def scratch(self, fill: Callable[[Path], None]) -> Iterator[Path]:
        """Yield a directory with data from `fill`, until the block ends. Raise StoreFull, Unavailable."""
        new = self._root / f"{_NEW}{new_run_id()}"
        try:
            try:
                (new / DATA).mkdir(parents=True, mode=0o700)
                fill(new / DATA)
            except OSError as error:
                raise write_error(error) from error
            yield new
        finally:
            shutil.rmtree(new, ignore_errors=True)

    def output(self, run_id: str) -> Path:
        """Return the directory that a run's command writes; it may not exist yet."""
        return self._root / run_id / _OUTPUT

    def record(self, task_id: str, run_id: str) -> RunRecord:
        """Return a task's run as it is now. Raise NotFound."""
        record = self._read(run_id) if is_run_id(run_id) else None
        if record is None or record.task_id != task_id:
            raise NotFound(
                f"There is no training run {run_id[:64]!r} of {task_id!r}; "
                f"GET /tasks/{task_id}/training-runs lists them."
            )
        return record

    def records(self, task_id: str) -> list[RunRecord]:
        """Return a task's runs, the newest first."""
        found = (self._read(run_id) for run_id in reversed(self._ids()))
        return [record for record in found if record is not None and record.task_id == task_id]

    def is_cancelled(self, run_id: str) -> bool:
        """Whether a run was asked to end."""
        return (self._root / run_id / _CANCEL).exists()

    def cancel(self, run_id: str) -> None:
        """Ask the server that has the run to end it. Raise StoreFull, Unavailable."""
        try:
            (self._root / run_id / _CANCEL).touch()
        except OSError as error:
            raise write_error(error) from error

    def prune(self) -> None:
        """Remove the oldest runs beyond the bounds, and what interrupted runs and uploads left."""
        count = total = 0
        for run_id in reversed(self._ids()):
            record = self._read(run_id)
            if record is not None and record.state is RunState.INTERRUPTED:
                shutil.rmtree(self._root / run_id / DATA, ignore_errors=True)
            if record is None or record.state.has_ended:
                count, total = count + 1, total + _size(self._root / run_id)
                if count > MAX_KEPT or total > MAX_KEPT_BYTES:
                    shutil.rmtree(self._root / run_id, ignore_errors=True)
        for left in self._unfinished():
            shutil.rmtree(left, ignore_errors=True)

    def _unfinished(self) -> Iterator[Path]:
        for path in self._root.glob(f"{_NEW}*"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _MAX_FILL_SECONDS:
                    yield path

    def _ids(self) -> list[str]:
        try:
            return sorted(filter(is_run_id, os.listdir(self._root)))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise Unavailable("The directory of training runs can't be read; try again shortly.") from error

    def _read(self, run_id: str) -> RunRecord | None:
        """Return a run's record; an unfinished one that no server holds was interrupted."""
        path = self._root / run_id
        try:
            is_held = _is_held(path / _LOCK)  # before the record, which its server writes before it lets go
            record = parse_record(read_bounded(path / _RECORD, _MAX_RECORD_BYTES))
        except (OSError, CorruptData):  # it was removed meanwhile, or is damaged
            return None
        if record.state.has_ended or is_held:
            return record
        return replace(record, state=RunState.INTERRUPTED)


def _write(directory: Path, record: RunRecord) -> None:
    temporary = directory / f"{_RECORD}.new"
    temporary.write_bytes(dump_record(record))
    temporary.replace(directory / _RECORD)


def _locked(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _is_held(path: Path) -> bool:
    """Whether a process holds the lock. Raise OSError where there is no such file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return 0
