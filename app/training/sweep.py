"""A small grid of settings by successive halving: all begin, the better half goes on, until one is left.

A candidate that goes on continues its run, whose schedule has been that of the whole run from the start: the
winner is the very run that its settings give without a sweep. Each candidate has a checkpoint, so a sweep
that was killed goes on too: what is trained already is looked up, and decisions follow from the looks.
"""

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from app.errors import InvalidRequest
from app.training.early_stopping import best_look, rank
from app.training.loop import Trainer
from app.training.run import DevRecord, TrainingResult
from app.training.settings import TrainingSettings
from app.validation import message_of

MAX_CANDIDATES = 64
_SHORT = {
    "lr": "learning_rate",
    "length": "num_virtual_tokens",
    "batch": "batch_size",
    "warmup": "warmup_steps",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A candidate after it was trained for some steps."""

    settings: TrainingSettings
    changes: dict[str, str]  # what the grid set, as it was written
    step: int
    look: DevRecord  # the best one so far


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepResult:
    """All trials, those of the last round last; the winner's run."""

    trials: tuple[Trial, ...]
    settings: TrainingSettings
    result: TrainingResult


def grid(settings: TrainingSettings, text: str) -> list[tuple[TrainingSettings, dict[str, str]]]:
    """Return the settings of each candidate of `lr=1e-3,1e-2 length=5,16`, and what the grid set of them.

    Raise InvalidRequest: no such setting, or a value that it doesn't take.
    """
    axes = [_axis(part) for part in text.split()]
    names = [name for name, _ in axes]
    if not axes or len({*names}) < len(names):
        raise InvalidRequest(
            "--sweep takes each setting once, such as: lr=1e-3,1e-2 length=5,16", param="sweep"
        )
    count = math.prod(len(values) for _, values in axes)
    if count > MAX_CANDIDATES:
        raise InvalidRequest(f"--sweep gives {count} candidates; {MAX_CANDIDATES} are allowed", param="sweep")
    points = itertools.product(*(values for _, values in axes))
    return [_candidate(settings, dict(zip(names, point, strict=True))) for point in points]


def _axis(part: str) -> tuple[str, list[str]]:
    name, _, values = part.partition("=")
    name = _SHORT.get(name, name).replace("-", "_")
    if name not in TrainingSettings.model_fields or not values:
        known = ", ".join((*_SHORT, *sorted(TrainingSettings.model_fields)))
        raise InvalidRequest(
            f"--sweep has {part!r}; it takes NAME=VALUE,VALUE with one of {known}", param="sweep"
        )
    return name, values.split(",")


def _candidate(
    settings: TrainingSettings, changes: dict[str, str]
) -> tuple[TrainingSettings, dict[str, str]]:
    given = {name: _value(text) for name, text in changes.items()}
    try:
        return TrainingSettings.model_validate(settings.model_dump() | given), changes
    except ValidationError as error:
        problem = error.errors()[0]
        name = str(problem["loc"][0])
        message = f"--sweep gives {name} {changes.get(name, '')}: {message_of(problem)}"
        raise InvalidRequest(message, param="sweep") from None


def _value(text: str) -> Any:
    """Return a number, or the text where it is none."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def run_sweep(
    candidates: Sequence[tuple[TrainingSettings, dict[str, str]]],
    trainer_of: Callable[[int, TrainingSettings], Trainer],
) -> SweepResult:
    """Train the candidates in rounds, each twice as long as the one before and with half as many of them.

    `trainer_of(number, settings)` makes a candidate's trainer, with a checkpoint directory of its own.
    """
    alive, trials = list(range(len(candidates))), list[Trial]()
    num_rounds = (len(candidates) - 1).bit_length() + 1
    for left in reversed(range(num_rounds)):
        looks: dict[int, DevRecord] = {}
        for number in alive:
            settings, changes = candidates[number]
            trainer = trainer_of(number, settings)
            until = _nearest_look(trainer, 2.0**-left)
            result = trainer.run(until)
            looks[number] = best_look([look for look in result.history.looks if look.step <= until])
            trials.append(Trial(settings=trainer.settings, changes=changes, step=until, look=looks[number]))
        alive.sort(key=lambda number: rank(looks[number]), reverse=True)
        alive = alive[: (len(alive) + 1) // 2]
    return SweepResult(trials=tuple(trials), settings=trainer.settings, result=result)


def _nearest_look(trainer: Trainer, share: float) -> int:
    """Return the step of the look that is nearest to a share of the whole run; never that of the start."""
    looks = max(1, round(share * trainer.num_steps / trainer.eval_every))
    return trainer.num_steps if share == 1 else min(looks * trainer.eval_every, trainer.num_steps)
