"""What a run comes to: scores on held-out examples, and the facts that push and the report show."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import app
from app import __version__
from app.cli.training.answerer import TaskAnswerer
from app.prompt import Prompt
from app.scoring.items import Outcome
from app.scoring.labels import expected_label, label_in, labels_of
from app.scoring.measures import Score, measure
from app.scoring.score_words import amount, title
from app.serving.publishing.task_settings import MAX_EXAMPLE_CHARS, LabelledChoice
from app.serving.publishing.training_record import MAX_SETTING_CHARS
from app.training.curves import curves_of
from app.training.examples import Dataset, Example
from app.training.report.contents import AnsweredExample, Candidate, Report
from app.training.run import Answerer
from app.training.settings import TrainingSettings

TRAINED, INSTRUCTION, BARE = "trained prompt", "instruction", "bare base"
IN_CONTEXT = "document in context"
_MAX_EXAMPLES = 4  # that each upload of the version runs
_CURVE_POINTS = 100  # kept with the version; a server holds live versions in memory
_GIT_SECONDS = 5.0
_CHOICES = "choices_accuracy"  # the fairest score of what was never taught to write a label
_MAX_COLUMNS = 3  # of metrics, on a terminal; the report has all


@dataclass(frozen=True, slots=True)
class Measured:
    """A candidate's scores, the main metric, notes, and each answer."""

    candidate: Candidate
    main: str
    notes: Sequence[str]
    answered: Sequence[AnsweredExample]


def measured(
    name: str,
    answerer: Answerer,
    prompt: Prompt | None,
    examples: Sequence[Example],
    *,
    choices: Sequence[LabelledChoice],
    template: str | None = None,
) -> Measured:
    """Answer the examples and score the answers; where there are choices, also as the most probable ones.

    Raise PromptplexError.
    """
    answers = answerer.answers(prompt, examples)
    probabilities: Sequence[Mapping[str, float] | None] = [None] * len(examples)
    if choices:
        assert isinstance(answerer, TaskAnswerer), "labels are scored by a task's answerer"
        probabilities = answerer.probabilities(prompt, examples, choices)
    outcomes = [
        Outcome(example.item, answer, probabilities=found)
        for example, answer, found in zip(examples, answers, probabilities, strict=True)
    ]
    names = [choice.value for choice in choices]
    measures = measure(outcomes, names)
    scores = measures.scores()
    candidate = Candidate(
        name=name, scores={measures.main: scores[measures.main]} | scores, template=template
    )
    labels = labels_of([outcome.item for outcome in outcomes], names)
    answered = [
        AnsweredExample(example, outcome.generated, _is_right(outcome, labels))
        for example, outcome in zip(examples, outcomes, strict=True)
    ]
    return Measured(candidate, measures.main, measures.notes, answered)


def _is_right(outcome: Outcome, labels: Sequence[str]) -> bool:
    if labels:
        return label_in(outcome.generated, labels) == expected_label(outcome.item)
    if outcome.item.answer is not None:
        return outcome.is_right
    return outcome.has_every_slot if outcome.item.slots else outcome.is_exact


def shown_examples(answered: Sequence[AnsweredExample]) -> list[dict[str, Any]]:
    """Return examples for the task part: answers that came out exactly, so that another base is noticed."""
    fitting = (
        {"inputs": each.example.inputs, "expected": each.example.output}
        for each in answered
        if each.generated.strip() == each.example.output.strip()
        and not each.example.messages
        and len(json.dumps(each.example.inputs)) + len(each.example.output) < MAX_EXAMPLE_CHARS
    )
    return [example for example, _ in zip(fitting, range(_MAX_EXAMPLES), strict=False)]


def training_record(report: Report) -> dict[str, Any]:
    """Return the `training` object of the task part."""
    curves = {name: curve.thinned(_CURVE_POINTS) for name, curve in curves_of(report.history).items()}
    return {
        "method": report.settings["method"],
        "settings": dict(report.settings),
        "data_sha256": report.data_sha256,
        "num_examples": dict(report.num_examples),
        "seed": report.settings["seed"],
        "steps": len(report.history.steps),
        "best_step": report.best_step,
        "seconds": round(report.seconds, 1),
        "code": dict(report.code or {}),
        "base_fingerprint": report.base_fingerprint,
        "curves": {
            name: {"steps": list(curve.steps), "values": [float(f"{value:.4g}") for value in curve.values]}
            for name, curve in curves.items()
        },
    }


def short_settings(settings: TrainingSettings) -> dict[str, Any]:
    """Return the settings as texts and numbers, long texts cut."""
    found = settings.model_dump(mode="json", exclude_none=True)
    return {name: short(value) for name, value in found.items()}


def short(value: Any) -> Any:
    """Return a setting as it is kept: a list as text, a long text cut."""
    if isinstance(value, list | tuple):
        value = ",".join(map(str, value))
    return value[:MAX_SETTING_CHARS] if isinstance(value, str) else value


def sizes(dataset: Dataset) -> dict[str, int]:
    """Return the number of examples of each split."""
    return {"train": len(dataset.train), "dev": len(dataset.dev), "test": len(dataset.test)}


def code_versions() -> dict[str, str]:
    """Return versions of what trains; `git` is the commit, where the code is a checkout."""
    import torch
    import transformers

    found = {
        "promptplex": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }
    return found | _git_commit(Path(app.__file__).parents[1])


def _git_commit(root: Path) -> dict[str, str]:
    if not (root / ".git").exists():
        return {}
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--match="]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"git": done.stdout.strip()}


def flat_metrics(report: Report) -> dict[str, float]:
    """Return the values for the `metrics` of the task part: `test exact`, and the main one of all others."""
    split, main, trained = report.measured_on, report.main_metric, report.trained
    found = {f"{split} {name}": score for name, score in trained.scores.items()}
    found |= {f"{split} {main}, {each.name}": each.scores[main] for each in report.others}
    return {name: round(score.metric.value, 4) for name, score in found.items()}


def table(report: Report) -> list[tuple[str, ...]]:
    """Return the scores as rows for a terminal, the heads first."""
    names = sorted(report.trained.scores, key=lambda name: name != _CHOICES)  # beside the main one
    names = [report.main_metric, *(name for name in names if name != report.main_metric)][:_MAX_COLUMNS]
    rows = [("", *map(title, names))]
    for each in report.candidates:
        rows.append((each.name, *(_cell(each.scores.get(name)) for name in names)))
    return rows


def _cell(score: Score | None) -> str:
    if score is None:
        return "-"
    value, low, high = (amount(score.metric.name, each) for each in (score.metric.value, *score.interval))
    return f"{value} [{low}, {high}]"


def as_json(value: Mapping[str, Any]) -> bytes:
    """Return JSON for a file."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"
