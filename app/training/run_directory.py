"""A run's directory: what a run reports as files, for whoever looks while it goes on and after it.

| file | what it holds |
|---|---|
| `run.json` | state, settings, data and base, best scores; replaced whole |
| `steps.jsonl`, `looks.jsonl`, `advice.jsonl` | a record a line, in the order in which they came |
| `checkpoint` | what a resumed run goes on from |

The command that trains adds its results (`prompt.safetensors`, `task.json`, `metrics.json`, `report.html`).
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from app.errors import Conflict, CorruptData, NotFound
from app.training.atomic_file import replace_file, writing
from app.training.run import DevRecord, History, StepRecord

_RUN = "run.json"
_STEPS, _LOOKS, _ADVICE = "steps.jsonl", "looks.jsonl", "advice.jsonl"


class RunState(StrEnum):
    """How far a run is."""

    PREPARING = "preparing"
    TRAINING = "training"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """What `run.json` says."""

    task: str
    settings: Mapping[str, Any]  # resolved
    data_digest: str  # sha256 (hex)
    base: str
    base_fingerprint: str
    state: RunState = RunState.PREPARING
    started_at: float = 0.0  # seconds since 1970, of the last start
    ended_at: float | None = None
    error: str | None = None
    best_step: int | None = None
    best_scores: Mapping[str, float] | None = None
    best_loss: float | None = None  # on the dev set


@dataclass(frozen=True, slots=True)
class RunView:
    """A run as its directory shows it at one moment."""

    status: RunStatus
    history: History


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold a run's directory, made where it isn't there, against other processes; before all use of it.

    Raise Conflict: another process holds it. Raise StoreFull.
    """
    with writing("the directory"):
        path.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _lock(lock, path.name)
        yield
    finally:
        os.close(lock)


def _lock(descriptor: int, name: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Conflict(
            f"another process trains into '{name}'; wait for it, or choose another --out"
        ) from None


class RunDirectory:
    """Writes a run's directory, which its process holds (`held`); a `Listener`. Any number may read."""

    def __init__(self, path: Path, status: RunStatus) -> None:
        """Begin a run. One that is there already stays as it is until it goes on (`on_start`).

        Raise StoreFull.
        """
        self.path = path
        self.status = replace(status, started_at=time.time())
        self._has_begun = not (path / _RUN).exists()
        if self._has_begun:
            self._write_status()

    def on_start(self, history: History) -> None:
        """Let the files hold the history and nothing else: what a killed process wrote after it is gone."""
        self._rewrite(_STEPS, map(asdict, history.steps))
        self._rewrite(_LOOKS, map(asdict, history.looks))
        self._rewrite(_ADVICE, ({"line": line} for line in history.advice))
        self._has_begun = True
        best = next((look for look in reversed(history.looks) if look.is_best), None)
        self._update(state=RunState.TRAINING, **_best(best))

    def on_step(self, record: StepRecord) -> None:
        """Append a step."""
        self._append(_STEPS, asdict(record))

    def on_dev(self, record: DevRecord) -> None:
        """Append a look, and show the best one's scores."""
        self._append(_LOOKS, asdict(record))
        if record.is_best:
            self._update(**_best(record))

    def on_advice(self, line: str) -> None:
        """Append a line."""
        self._append(_ADVICE, {"line": line})

    def write(self, name: str | Path, data: bytes) -> None:
        """Put one of the results into the directory, or a folder of it, whole. Raise StoreFull."""
        path = self.path / name
        with writing(path.name):
            path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, data)

    def end(self, state: RunState, error: str | None = None) -> None:
        """Say what became of the run; nothing of one that couldn't be resumed."""
        if self._has_begun:
            self._update(state=state, error=error, ended_at=time.time())

    def _update(self, **changes: Any) -> None:
        self.status = replace(self.status, **changes)
        self._write_status()

    def _write_status(self) -> None:
        replace_file(self.path / _RUN, json.dumps(asdict(self.status), indent=1).encode())

    def _rewrite(self, name: str, records: Iterable[Mapping[str, Any]]) -> None:
        replace_file(self.path / name, b"".join(map(_line, records)))

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        with writing(name), open(self.path / name, "ab", buffering=0) as file:
            file.write(_line(record))


def read_run(path: Path) -> RunView:
    """Return a run as its directory shows it, while it goes on or afterwards.

    Raise NotFound: there is no run. Raise CorruptData: `run.json` can't be read.
    """
    try:
        fields = json.loads((path / _RUN).read_bytes())
        status = RunStatus(**fields | {"state": RunState(fields["state"])})
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"there is no training run in '{path.name}'") from None
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptData(f"{_RUN} of the training run in '{path.name}' can't be read: {error}") from None
    return RunView(status, _read_history(path))


def _read_history(path: Path) -> History:
    return History(
        tuple(StepRecord(**record) for record in _records(path / _STEPS)),
        tuple(DevRecord(**record) for record in _records(path / _LOOKS)),
        tuple(record["line"] for record in _records(path / _ADVICE)),
    )


def _records(path: Path) -> list[Any]:
    """Return the records of whole lines; the last line may be one that is just being written."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, allow_nan=False).encode() + b"\n"


def _best(look: DevRecord | None) -> dict[str, Any]:
    if look is None:
        return {"best_step": None, "best_scores": None, "best_loss": None}
    return {"best_step": look.step, "best_scores": look.scores, "best_loss": look.loss}
