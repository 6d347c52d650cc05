"""Optimizers and learning-rate schedules."""

import math
from collections.abc import Iterable

from torch.nn import Parameter
from torch.optim import AdamW, Optimizer
from transformers.optimization import Adafactor

from app.training.settings import TrainingSettings


def make_optimizer(settings: TrainingSettings, parameters: Iterable[Parameter]) -> Optimizer:
    """Return AdamW, or Adafactor as Lester et al. (2021) had it: no parameter scaling, beta2 decay 0.8.

    `settings` are resolved. The learning rate is set before each step.
    """
    assert settings.weight_decay is not None
    if settings.optimizer == "adamw":
        return AdamW(parameters, lr=0.0, weight_decay=settings.weight_decay, fused=True)
    return Adafactor(
        parameters,
        lr=0.0,
        weight_decay=settings.weight_decay,
        decay_rate=-0.8,
        scale_parameter=False,
        relative_step=False,
    )


def learning_rate(settings: TrainingSettings, step: int) -> float:
    """Return the learning rate of step 1 to `steps`, as transformers' schedules have it."""
    assert settings.learning_rate is not None
    assert settings.steps is not None
    assert settings.schedule is not None
    done, warmup = step - 1, settings.warmup_steps
    if done < warmup:
        return settings.learning_rate * done / warmup
    progress = (done - warmup) / max(1, settings.steps - warmup)
    return settings.learning_rate * _decay(settings.schedule, progress)


def _decay(schedule: str, progress: float) -> float:
    """Return the share of the learning rate that is left after a share of the steps."""
    if schedule == "constant":
        return 1.0
    return 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
