"""A run as clients see it: its record, and what its process has written."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import TypedDict

from app.errors import PromptplexError
from app.serving.publishing.training_record import MAX_POINTS
from app.serving.training_runs.records import PublishedRow, RunRecord, RunState
from app.serving.training_runs.service import TrainingRuns
from app.store.bounded import read_bounded
from app.strict_json import JsonError, parse_json
from app.training.curves import curves_of
from app.training.report.contents import tokens_per_second
from app.training.run_directory import RunState as ProcessState
from app.training.run_directory import RunView, read_run
from app.validation import closed

MAX_ADVICE = 50  # lines
_RATE_STEPS = 20  # tokens per second are a mean over so many
_MAX_METRICS_BYTES = 4 << 20
_METRICS = "metrics.json"
_SHOWN = ("main_metric", "test", "data", "warnings")  # of it

Phase = Literal["preparing", "training", "publishing"]
_Time = Annotated[str | None, Field(description="ISO 8601; null: not yet")]


@closed
class CurveRow(TypedDict):
    """Values over the steps of a run."""

    steps: list[int]
    values: list[float]


class TrainingRunRow(TypedDict):
    """A run, without its curves."""

    id: str
    task_id: str
    state: Literal["queued", "running", "done", "failed", "cancelled", "interrupted"]
    phase: Annotated[Phase | None, Field(description="Of a run that goes on; null: it doesn't")]
    queue_position: Annotated[int | None, Field(description="From 1; null: it doesn't wait at this server")]
    is_cancelling: Annotated[bool, Field(description="Whether it was asked to end, and hasn't yet")]
    who: Annotated[str, Field(description="Name of the key that started it")]
    settings: Annotated[dict[str, Any], Field(description="As they were sent")]
    files: Annotated[dict[str, int], Field(description="Bytes of each data file, by part")]
    created_at: Annotated[str, Field(description="ISO 8601")]
    started_at: _Time
    ended_at: _Time
    error: Annotated[str | None, Field(description="Why it failed")]
    published: PublishedRow | None


@closed
class TrainingRun(TrainingRunRow):
    """A run with all that is known of it."""

    step: Annotated[int, Field(description="Steps that are done")]
    steps: Annotated[int | None, Field(description="Of the whole run, which may end earlier")]
    tokens_per_second: Annotated[float | None, Field(description="Of training, over the last steps")]
    best_step: int | None
    best_scores: Annotated[dict[str, float] | None, Field(description="On the dev examples, by metric")]
    curves: Annotated[
        dict[str, CurveRow],
        Field(description=f"`loss`, `dev loss`, `dev <metric>`: at most {MAX_POINTS} points each"),
    ]
    advice: Annotated[list[str], Field(description="What the trainer suggests, a line each")]
    result: Annotated[
        dict[str, Any] | None,
        Field(description="Scores on the test examples, beside those without the prompt; null: not yet"),
    ]


@closed
class TrainingRunList(TypedDict):
    """A task's runs."""

    runs: Annotated[list[TrainingRunRow], Field(description="The newest first")]


def run_row(runs: TrainingRuns, record: RunRecord) -> TrainingRunRow:
    """Return a run without its curves."""
    return _row(runs, record, _view(runs, record) if record.state is RunState.RUNNING else None)


def run_detail(runs: TrainingRuns, record: RunRecord) -> TrainingRun:
    """Return a run with its curves."""
    view = _view(runs, record)
    steps = () if view is None else view.history.steps
    curves = {} if view is None else curves_of(view.history)
    thinned = {name: curve.thinned(MAX_POINTS) for name, curve in curves.items()}
    scores = None if view is None else view.status.best_scores
    return {
        **_row(runs, record, view),
        "step": steps[-1].step if steps else 0,
        "steps": None if view is None else view.status.settings.get("steps"),
        "tokens_per_second": tokens_per_second(steps[-_RATE_STEPS:]) if steps else None,
        "best_step": None if view is None else view.status.best_step,
        "best_scores": None if scores is None else dict(scores),
        "curves": {
            name: {"steps": list(curve.steps), "values": list(curve.values)}
            for name, curve in thinned.items()
        },
        "advice": [] if view is None else list(view.history.advice[-MAX_ADVICE:]),
        "result": _result(runs.directory.output(record.id)),
    }


def _row(runs: TrainingRuns, record: RunRecord, view: RunView | None) -> TrainingRunRow:
    is_open = not record.state.has_ended
    return {
        "id": record.id,
        "task_id": record.task_id,
        "state": record.state.value,
        "phase": _phase(view) if record.state is RunState.RUNNING else None,
        "queue_position": runs.position(record.id) if record.state is RunState.QUEUED else None,
        "is_cancelling": is_open and runs.directory.is_cancelled(record.id),
        "who": record.who,
        "settings": dict(record.settings),
        "files": dict(record.files),
        "created_at": record.created_at,
        "started_at": record.started_at,
        "ended_at": record.ended_at,
        "error": record.error,
        "published": record.published,
    }


def _view(runs: TrainingRuns, record: RunRecord) -> RunView | None:
    """Return what the process has written; None: nothing yet, or nothing that can be read."""
    try:
        return read_run(runs.directory.output(record.id))
    except (PromptplexError, OSError, ValueError, TypeError, KeyError):
        return None


def _phase(view: RunView | None) -> Phase:
    if view is None or view.status.state is ProcessState.PREPARING:
        return "preparing"
    return "training" if view.status.state is ProcessState.TRAINING else "publishing"


def _result(output: Path) -> dict[str, Any] | None:
    try:
        found = parse_json(read_bounded(output / _METRICS, _MAX_METRICS_BYTES))
    except (OSError, JsonError):
        return None
    return {name: found[name] for name in _SHOWN if name in found} if isinstance(found, dict) else None
