"""Lines for a user whose run goes wrong or could go further: what was seen, and what to do about it."""

from collections.abc import Sequence

from app.training.early_stopping import main_score
from app.training.run import DevRecord
from app.training.settings import TrainingSettings

_MOVED = 0.02  # share of the first dev loss: less than that is standing still
_EARLIEST = 20  # steps after which standing still means something
_GOOD = 0.95  # a score from which on there is little to gain


def on_non_finite(what: str, step: int, best_step: int, settings: TrainingSettings) -> str:
    """Return advice for a loss or gradient of NaN or infinity at a step."""
    precision = "" if settings.precision == "float32" else ", or with --precision float32"
    return (
        f"the {what} of step {step} is not finite, so training ended with the prompt of step {best_step}: "
        f"train with a lower learning rate ({_rate(settings, 0.1)}) or more warm-up steps{precision}"
    )


def on_frozen(looks: Sequence[DevRecord], settings: TrainingSettings) -> str | None:
    """Return advice where the dev loss stands where it stood at the start, else None."""
    first, last = looks[0], looks[-1]
    trained = last.step - settings.warmup_steps
    if trained < min(_EARLIEST, settings.steps or 1) or main_score(last) >= _GOOD:
        return None
    if any(abs(first.loss - look.loss) > _MOVED * first.loss for look in looks):
        return None
    return (
        f"the dev loss has not moved in {last.step} steps ({first.loss:.4g} to {last.loss:.4g}): raise the "
        f"learning rate ({_rate(settings, 10)}), or compare some with --sweep"
    )


def on_end(looks: Sequence[DevRecord], best: DevRecord, settings: TrainingSettings) -> str | None:
    """Return advice that a whole run's looks give, else None."""
    last = looks[-1]
    if best.step == 0 and last.step > 0:
        return (
            "no look was better than the prompt that training started from: lower the learning rate "
            f"({_rate(settings, 0.1)}), or compare some with --sweep"
        )
    if len(looks) > 2 and best is last and last.step == settings.steps and main_score(last) < _GOOD:
        return f"the last look was the best one: more steps (--steps {2 * last.step}) may do better"
    return None


def _rate(settings: TrainingSettings, factor: float) -> str:
    assert settings.learning_rate is not None, "settings are resolved"
    return f"--learning-rate {min(settings.learning_rate * factor, 10):.1g}"
