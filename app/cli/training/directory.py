"""The directory of a run that a command writes: held while it goes on, and gone where nothing came of it."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from app.training.checkpoint import has_checkpoint
from app.training.run_directory import RunDirectory, RunState, held

SWEEP = "sweep"  # checkpoints of a sweep's candidates


@contextlib.contextmanager
def run_directory(out: Path) -> Iterator[None]:
    """Hold a run's directory; leave nothing of a failure behind, unless there is a checkpoint to go on from.

    Raise Conflict: another process trains into it, and keeps it as it is.
    """
    missing = [path for path in (out, *out.parents) if not path.exists()]
    with held(out):
        try:
            yield
        except BaseException:
            if missing and not is_resumable(out):
                shutil.rmtree(out, ignore_errors=True)
                with contextlib.suppress(OSError):  # another run may have begun beside it
                    for parent in missing[1:]:
                        parent.rmdir()
            raise


def is_resumable(out: Path) -> bool:
    """Return whether a run left a checkpoint."""
    return has_checkpoint(out) or (out / SWEEP).exists()


@contextlib.contextmanager
def ending(directory: RunDirectory) -> Iterator[None]:
    """Write into `run.json` what became of the run."""
    try:
        yield
    except KeyboardInterrupt:
        directory.end(RunState.CANCELLED)
        raise
    except BaseException as error:
        directory.end(RunState.FAILED, str(error) or type(error).__name__)
        raise
    directory.end(RunState.DONE)
