"""How sequences ended: counted by task, and passed on to metrics, log and quotas."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

from app.errors import (
    Cancelled,
    ConstraintFailed,
    DeadlineExceeded,
    Forbidden,
    InvalidRequest,
    NotFound,
    NotServable,
)
from app.prompt import TaskVersion
from app.request import FinishReason, Outcome, RequestTimings


@dataclass(slots=True, kw_only=True)
class Attempt:
    """One sequence on its way, from its arrival to its end. As a context it is recorded when it ends."""

    recorder: "OutcomeRecorder"
    tenant: str
    deadline: float | None  # time.monotonic() seconds
    begin: float = field(default_factory=time.monotonic)
    version: TaskVersion | None = None
    is_trial: bool = False
    sample: int = 0
    step: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    timings: RequestTimings | None = None
    reason: str = ""  # why it ended, as soon as that is known

    def __enter__(self) -> "Attempt":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.reason = self.reason or self.failure(error)
        self.recorder.record(self)

    def failure(self, error: BaseException) -> str:
        """Return the reason of an error."""
        return failure_of(error, self.deadline)


def failure_of(error: BaseException, deadline: float | None) -> str:
    """Return why something failed; a cancellation after the deadline has the deadline as its cause."""
    if isinstance(error, Cancelled | asyncio.CancelledError | GeneratorExit):
        return "deadline" if deadline is not None and deadline <= time.monotonic() else "cancelled"
    if isinstance(error, DeadlineExceeded):
        return "deadline"
    if isinstance(error, InvalidRequest | NotFound | NotServable | Forbidden):
        return "refused"
    return "constraint" if isinstance(error, ConstraintFailed) else "error"


class OutcomeRecorder:
    """Counts finished requests by task. Belongs to one event loop."""

    def __init__(self, on_outcome: Callable[[Outcome], None]) -> None:
        self._on_outcome = on_outcome
        self.served: Counter[str] = Counter()  # finished requests by task id, since the start

    def record(self, attempt: Attempt) -> None:
        """Count an attempt that has ended, and pass its outcome on."""
        version, reason = attempt.version, attempt.reason or "error"
        if version is not None and reason in tuple(FinishReason) and not attempt.is_trial:
            self.served[version.task_id] += 1
        self._on_outcome(
            Outcome(
                task="" if version is None else version.task_id,
                version=0 if version is None else version.version,
                reason=reason,
                prompt_tokens=attempt.prompt_tokens,
                generated_tokens=attempt.generated_tokens,
                seconds=time.monotonic() - attempt.begin,
                timings=attempt.timings,
                tenant=attempt.tenant,
                is_trial=attempt.is_trial,
                sample=attempt.sample,
                step=attempt.step,
            )
        )
