"""Training runs: one at a time, the others in a short queue; a thread starts and watches their processes."""

import asyncio
import contextlib
import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from app.errors import InvalidRequest, PromptplexError, RateLimited, Unavailable
from app.serving.publishing.bundle import read_bundle
from app.serving.publishing.publisher import PublishingService, UploadResult
from app.serving.training_runs.data_files import data_paths
from app.serving.training_runs.data_summary import DataSummary, summary_command
from app.serving.training_runs.process import ProcessLimits, TrainingProcess
from app.serving.training_runs.records import PublishedRow, RunRecord, RunState
from app.serving.training_runs.run_files import DATA, LOG, RunDirectory, RunFiles
from app.strict_json import parse_json

_log = logging.getLogger(__name__)
CANDIDATE = "candidate"
MAX_UNFINISHED = 5  # runs of this server: one that goes on, the others wait
MAX_UNFINISHED_OF_KEY = 2
_GRACE_SECONDS = 10.0  # between SIGTERM and SIGKILL, for a run that is cancelled
_SHUTDOWN_GRACE_SECONDS = 2.0
_LOOK_SECONDS = 0.25  # between two looks whether a run was cancelled, here or at another replica
_RETRY_SECONDS = 60.0
_SUMMARY_SECONDS = 60.0
_UNEXPECTED = "the training process ended unexpectedly; the server's log has the end of its output"
_INTERNAL = "something went wrong inside the server; its log has the details"

Command = Callable[[RunFiles], Sequence[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """What the operator set."""

    directory: Path  # of the runs
    limits: ProcessLimits = field(default_factory=ProcessLimits)


class Place:
    """Room for a run, of the server and of a key; the run keeps it until it ends."""

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        self.is_kept = False


class TrainingRuns:
    """Starts, watches, ends and publishes runs. Thread-safe."""

    def __init__(self, publishing: PublishingService, config: TrainingConfig, command: Command) -> None:
        """`command` returns what a run's process executes."""
        self.directory = RunDirectory(config.directory)
        self.limits = config.limits
        self._publishing = publishing
        self._command = command
        self._queue: deque[tuple[RunFiles, Place]] = deque()
        self._places: Counter[str] = Counter()
        self._changed = threading.Condition()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._work, name="training-runs", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def place(self, tenant: str) -> Iterator[Place]:
        """Hold this from before a run's data is received; `submit` keeps it. Raise RateLimited.

        `tenant` is the key's name, "" where there are no keys.
        """
        with self._changed:
            self._check_room(tenant)
            self._places[tenant] += 1
        place = Place(tenant)
        try:
            yield place
        finally:
            if not place.is_kept:
                self._give_back(place)

    def submit(self, place: Place, record: RunRecord, fill: Callable[[Path], None]) -> None:
        """Take a run into the queue; `fill` writes its data. Raise StoreFull, Unavailable."""
        run = self.directory.create(record, fill)
        with self._changed:
            if self._is_stopping:  # nothing would take it from the queue
                run.end(record.ended(RunState.INTERRUPTED))
                run.close()
                raise Unavailable("The server is shutting down; start the run on another one, or later.")
            place.is_kept = True
            self._queue.append((run, place))
            self._changed.notify_all()

    def summary(self, fill: Callable[[Path], None], options: dict[str, Any]) -> DataSummary:
        """Read data as a run would, in a process like a run's; `options` say how to split it.

        Raise InvalidRequest, which names the line that is wrong; StoreFull, Unavailable.
        """
        with self.directory.scratch(fill) as scratch:
            out = scratch / "summary.json"
            command = summary_command(out, options, data_paths(scratch / DATA))
            process = TrainingProcess(command, self.limits, scratch / LOG)
            process.wait(_SUMMARY_SECONDS)
            if process.is_running:
                process.end(0)
                raise Unavailable("Reading the data takes too long just now; start the run, or try again.")
            if process.status == 0:
                found: DataSummary = parse_json(out.read_bytes())
                return found
            reason = process.error()
            if reason is None:
                _log.error("data can't be summed up:\n%s", process.tail())
            raise InvalidRequest(reason or _UNEXPECTED, param="data")

    def position(self, run_id: str) -> int | None:
        """Return a run's place in the queue of this server, from 1; None: it doesn't wait here."""
        with self._changed:
            waiting = [run.record.id for run, _ in self._queue]
        return waiting.index(run_id) + 1 if run_id in waiting else None

    def cancel(self, record: RunRecord) -> None:
        """End a run, whichever replica has it; one that has ended stays as it is. Raise StoreFull."""
        if not record.state.has_ended:
            self.directory.cancel(record.id)
            self._drop_cancelled()

    def stop(self) -> None:
        """Start no further run, and end the one that goes on; return at once."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()

    def close(self) -> None:
        """Do the same, and return when no process is left."""
        self.stop()
        self._thread.join()

    def _check_room(self, tenant: str) -> None:
        if tenant and self._places[tenant] >= MAX_UNFINISHED_OF_KEY:
            raise RateLimited(
                f"This key has {MAX_UNFINISHED_OF_KEY} training runs that haven't ended; cancel one, or try "
                "again when one has.",
                retry_after=_RETRY_SECONDS,
            )
        if self._places.total() >= MAX_UNFINISHED:
            raise RateLimited(
                f"{MAX_UNFINISHED} training runs wait or run on this server already; cancel one, or try "
                "again when one has ended.",
                retry_after=_RETRY_SECONDS,
            )

    def _give_back(self, place: Place) -> None:
        with self._changed:
            self._places[place.tenant] -= 1

    def _work(self) -> None:
        self._prune()
        while (taken := self._next()) is not None:
            run, place = taken
            with self._released(run, place):
                self._end(run, self._outcome(run))
            self._prune()
        while self._queue:
            run, place = self._queue.popleft()
            with self._released(run, place):
                self._end(run, run.record.ended(RunState.INTERRUPTED))

    def _prune(self) -> None:
        """Remove old runs; those that come aren't held up where that fails."""
        try:
            self.directory.prune()
        except (OSError, PromptplexError):
            _log.exception("old training runs can't be removed")

    def _next(self) -> tuple[RunFiles, Place] | None:
        """Wait for a run; None: there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._is_stopping)
            return None if self._is_stopping else self._queue.popleft()

    @contextlib.contextmanager
    def _released(self, run: RunFiles, place: Place) -> Iterator[None]:
        """Let go of a run in the end; a failure of this server ends it too."""
        try:
            yield
        except (Exception, asyncio.CancelledError):
            _log.exception("training run %s", run.record.id)
            run.end(run.record.ended(RunState.FAILED, error=_INTERNAL))
        finally:
            run.close()
            self._give_back(place)

    def _outcome(self, run: RunFiles) -> RunRecord:
        """Carry a run out, and return its record in the end."""
        if run.is_cancelled:
            return run.record.ended(RunState.CANCELLED)
        run.write(run.record.begun())
        process = TrainingProcess(self._command(run), self.limits, run.log)
        ended = self._watch(run, process)
        if ended is not None:
            return run.record.ended(ended)
        if process.status != 0:
            return run.record.ended(RunState.FAILED, error=self._reason(run, process))
        return self._published(run) if run.record.publish else run.record.ended(RunState.DONE)

    def _watch(self, run: RunFiles, process: TrainingProcess) -> RunState | None:
        """Return when the process has ended: None where it did so by itself."""
        while process.is_running:
            if self._is_stopping:
                process.end(_SHUTDOWN_GRACE_SECONDS)
                return RunState.INTERRUPTED
            if run.is_cancelled:
                process.end(_GRACE_SECONDS)
                return RunState.CANCELLED
            self._drop_cancelled()
            process.wait(_LOOK_SECONDS)
        return None

    def _drop_cancelled(self) -> None:
        """End the runs that wait and are to wait no longer."""
        with self._changed:
            dropped = [(run, place) for run, place in self._queue if run.is_cancelled]
            self._queue = deque(each for each in self._queue if each not in dropped)
        for run, place in dropped:
            with self._released(run, place):
                self._end(run, run.record.ended(RunState.CANCELLED))

    def _reason(self, run: RunFiles, process: TrainingProcess) -> str:
        reason = process.error()
        if reason is None:
            ended = f"training run {run.record.id} ended with status {process.status}"
            _log.error("%s:\n%s", ended, process.tail())
        return reason or _UNEXPECTED

    def _published(self, run: RunFiles) -> RunRecord:
        """Publish what a run made, through every check that an upload passes."""
        try:
            result = asyncio.run(self._publish(run))
        except (PromptplexError, ValueError, OSError) as error:
            if self._is_stopping:
                return run.record.ended(RunState.INTERRUPTED)
            said = error if isinstance(error, PromptplexError) else _INTERNAL
            _log.warning("training run %s made no version: %s", run.record.id, error)
            return run.record.ended(RunState.FAILED, error=f"it was trained, but not published: {said}")
        published: PublishedRow = {
            "version": result.version.version,
            "version_digest": f"sha256:{result.version.digest}",
            "release": None if result.release is None else result.release.number,
        }
        return run.record.ended(RunState.DONE, published=published)

    async def _publish(self, run: RunFiles) -> UploadResult:
        bundle = replace(read_bundle(run.output), alias=CANDIDATE, who=run.record.who)
        return await self._publishing.upload(run.record.task_id, bundle, tenant=run.record.tenant)

    def _end(self, run: RunFiles, record: RunRecord) -> None:
        run.end(record)
        _log.info("training run %s of %s: %s", record.id, record.task_id, record.error or record.state)
