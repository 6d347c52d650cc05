"""The nouns of a report, and `metrics.json`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from app.scoring.measures import Score
from app.scoring.score_words import amount, title
from app.training.examples import Example
from app.training.run import History, StepRecord

MAX_SHOWN = 12  # examples of each kind
Split = Literal["test", "dev", "train"]
MEASURED_ON: Mapping[Split, str] = {
    "test": "held-out examples",
    "dev": "dev examples, by which the step was chosen",
    "train": "examples that it was trained on",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """What was measured: the trained prompt, or what it is compared with."""

    name: str
    scores: Mapping[str, Score]  # by metric, the main one first
    template: str | None = None


@dataclass(frozen=True, slots=True)
class AnsweredExample:
    """An example that was measured, and what was generated."""

    example: Example
    generated: str
    is_right: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRow:
    """One run of a sweep."""

    settings: Mapping[str, Any]  # those that differ between the runs
    steps: int
    score: float
    is_chosen: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A finished run. `candidates` begins with the trained prompt."""

    task: str
    base: str
    base_fingerprint: str
    main_metric: str
    candidates: Sequence[Candidate]
    answered: Sequence[AnsweredExample]  # by the trained prompt
    settings: Mapping[str, Any]
    template: str | None
    data: str  # names of its files
    data_sha256: str
    num_examples: Mapping[str, int]  # by split
    history: History
    best_step: int
    seconds: float
    measured_on: Split = "test"  # where no test examples are held out, dev; without these, train
    warnings: Sequence[str] = ()  # about the data
    trials: Sequence[TrialRow] = ()
    notes: Sequence[str] = ()  # of the metrics
    prompt_bytes: int = 0
    code: Mapping[str, str] | None = None

    @property
    def trained(self) -> Candidate:
        """Return the trained prompt's row."""
        return self.candidates[0]

    @property
    def others(self) -> Sequence[Candidate]:
        """Return what it is compared with."""
        return self.candidates[1:]

    def verdict(self) -> str:
        """Return one sentence about the result."""
        value = self.trained.scores[self.main_metric].metric.value
        best = max(self.others, key=lambda each: each.scores[self.main_metric].metric.value, default=None)
        name = self.main_metric
        examples = f"{self.num_examples[self.measured_on]} {MEASURED_ON[self.measured_on]}"
        said = f"{title(name)} {amount(name, value)} on {examples}"
        if best is None:
            return said
        other = best.scores[self.main_metric].metric.value
        return f"{said}; {best.name}: {amount(name, other)}"


def metrics_json(report: Report) -> dict[str, Any]:
    """Return what `metrics.json` holds; `test` is empty where no test examples were held out."""
    scores = {each.name: _scores(each) for each in report.candidates}
    return {
        "task": report.task,
        "base": {"name": report.base, "fingerprint": report.base_fingerprint},
        "data": {"sha256": report.data_sha256, "num_examples": dict(report.num_examples)},
        "settings": dict(report.settings),
        "main_metric": report.main_metric,
        "test": scores if report.measured_on == "test" else {},
        "dev": [
            {"step": look.step, "is_best": look.is_best, "loss": look.loss, **look.scores}
            for look in report.history.looks
        ],
        "best_step": report.best_step,
        "steps": len(report.history.steps),
        "seconds": round(report.seconds, 1),
        "tokens_per_second": round(tokens_per_second(report.history.steps), 1),
        "trials": [
            {"settings": dict(row.settings), "steps": row.steps, "score": row.score, "chosen": row.is_chosen}
            for row in report.trials
        ],
        "warnings": list(report.warnings),
        "advice": list(report.history.advice),
        "code": dict(report.code or {}),
    }


def tokens_per_second(steps: Sequence[StepRecord]) -> float:
    """Return the tokens that the base read per second of training, looks left out."""
    return sum(step.num_tokens for step in steps) / max(sum(step.seconds for step in steps), 1e-9)


def _scores(candidate: Candidate) -> dict[str, Any]:
    return {name: score.as_json() for name, score in candidate.scores.items()}
