"""The training loop: steps, looks at the dev set, checkpoints; the best prompt comes out.

Everything but the weights is a function of seed and step (batches, learning rate, random numbers), so a run
that was killed goes on from its checkpoint as if nothing had happened, bit for bit on the same machine.
"""

import hashlib
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from app.errors import NonFiniteLogits
from app.models.placement import choose_dtype
from app.training import advice
from app.training.base import TrainingBase
from app.training.batches import BatchOrder
from app.training.dev_set import DevSet, Objective, size
from app.training.early_stopping import num_stale
from app.training.examples import EncodedExample
from app.training.optimizers import learning_rate, make_optimizer
from app.training.progress import Progress
from app.training.prompted_model import PromptedModel
from app.training.prompts import LearnedPrompt, as_prompt
from app.training.run import DevRecord, Listener, StepRecord, TrainingResult
from app.training.settings import TrainingSettings


class _NonFinite(Exception):
    """A loss or gradient of NaN or infinity."""

    def __init__(self, what: str, step: int) -> None:
        self.what = what
        self.step = step


@dataclass(kw_only=True)
class Trainer:
    """One run. `learned` is trained in place, and afterwards is what the last step made of it.

    Without dev examples, a sample of the training examples is looked at, and their losses alone.
    """

    base: TrainingBase
    learned: LearnedPrompt
    settings: TrainingSettings
    train: Sequence[EncodedExample]
    dev: DevSet
    listener: Listener
    checkpoint_dir: Path | None = None  # None: the run can't be resumed
    checkpoint_seconds: float = 30.0  # between two checkpoints, at least
    objective: Objective | None = None  # None: the likelihood of the targets
    origin: Mapping[str, str] = field(default_factory=dict)  # what else tells this run from others, by name
    is_interrupted: Callable[[], bool] = lambda: False  # asked after each step

    def __post_init__(self) -> None:
        """Prepare the run; nothing is read or written yet."""
        self.settings = self.settings.resolved(is_encoder_decoder=self.base.is_encoder_decoder)
        seed, sizes = self.settings.seed, [size(example) for example in self.train]
        self._order = BatchOrder(sizes, self.settings.batch_size, seed)
        dev = self.dev if self.dev.encoded else DevSet(encoded=self.train)
        self._dev = dev.sample(self.settings.num_eval, seed)
        self._objective = self.objective or PromptedModel(self.base, self.learned)
        self._parameters = [each for each in self.learned.parameters() if each.requires_grad]
        self._optimizer = make_optimizer(self.settings, self._parameters)
        self._progress = Progress(self.listener, self.checkpoint_dir, self._identity())

    @property
    def num_steps(self) -> int:
        """Return the steps of the whole run."""
        assert self.settings.steps is not None, "settings are resolved"
        return self.settings.steps

    @property
    def eval_every(self) -> int:
        """Return the steps between two looks."""
        assert self.settings.eval_every is not None, "settings are resolved"
        return self.settings.eval_every

    def run(self, until: int | None = None) -> TrainingResult:
        """Train to the end, or to step `until` of the same run; go on from a checkpoint where there is one.

        Raise CorruptData or Conflict: the checkpoint is damaged, or of another run. Raise NonFiniteLogits:
        already the prompt that training starts from gives no finite loss. Raise StoreFull.
        Raise KeyboardInterrupt where the run was interrupted; it has a checkpoint then.
        """
        progress, last = self._progress, self.num_steps if until is None else until
        progress.resume(self.learned, self._optimizer)
        try:
            if not progress.looks:
                self._look()
            while not progress.is_over and progress.step < last:
                progress.add_step(self._step(progress.step + 1))
                if progress.step % self.eval_every == 0 or progress.step == self.num_steps:
                    self._look()
                    self._judge()
                progress.save(self.learned, self._optimizer, min_seconds=self.checkpoint_seconds)
                self._stop_if_interrupted()
        except _NonFinite as found:
            self._stop(found)
        progress.save(self.learned, self._optimizer)
        return progress.result()

    def _stop_if_interrupted(self) -> None:
        """Raise KeyboardInterrupt, after a checkpoint."""
        if self.is_interrupted():
            self._progress.save(self.learned, self._optimizer)
            raise KeyboardInterrupt

    def _step(self, step: int) -> StepRecord:
        """Lower the loss of the next batches."""
        began, batches = time.perf_counter(), self._batches(step)
        torch.manual_seed(random.Random(f"step {step}, seed {self.settings.seed}").getrandbits(63))
        self.learned.train()
        loss = self._backward(batches)
        grad_norm = torch.nn.utils.clip_grad_norm_(self._parameters, self.settings.max_grad_norm).item()
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            raise _NonFinite("gradient" if math.isfinite(loss) else "loss", step)
        rate = learning_rate(self.settings, step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        return StepRecord(
            step=step,
            loss=loss,
            learning_rate=rate,
            grad_norm=grad_norm,
            num_tokens=sum(size(example) for batch in batches for example in batch),
            seconds=time.perf_counter() - began,
        )

    def _batches(self, step: int) -> list[list[EncodedExample]]:
        first = (step - 1) * self.settings.accumulation
        numbers = range(first, first + self.settings.accumulation)
        return [[self.train[index] for index in self._order.batch(number)] for number in numbers]

    def _backward(self, batches: Sequence[Sequence[EncodedExample]]) -> float:
        """Leave the gradient of the mean loss over the targets' tokens of all batches; return that loss."""
        total, num_tokens = torch.zeros((), device=self.base.model.device), 0
        for batch in batches:
            with self._autocast():
                loss, count = self._objective.loss(batch)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
            num_tokens += count
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter.grad /= num_tokens
        return total.item() / num_tokens

    def _look(self) -> None:
        """Look at the dev set with the prompt as it is now."""
        began, step = time.perf_counter(), self._progress.step
        self.learned.eval()
        with self._autocast():
            loss = self._dev.loss(self._objective, self.settings.batch_size)
        if not math.isfinite(loss):
            raise _NonFinite("dev loss", step)
        prompts = tuple(as_prompt(self.learned, task) for task in range(self.learned.num_tasks))
        scores = self._dev.scores(prompts)
        seconds = time.perf_counter() - began
        record = DevRecord(step=step, loss=loss, scores=scores, is_best=False, seconds=seconds)
        self._progress.add_look(record, prompts)

    def _judge(self) -> None:
        """Give advice on the looks so far; end the run after its last step, or where looks don't improve."""
        progress = self._progress
        is_stale = num_stale(progress.looks) >= self.settings.patience
        progress.is_over = is_stale or progress.step == self.num_steps
        if not progress.advice:
            progress.add_advice(advice.on_frozen(progress.looks, self.settings))
        if not progress.advice and progress.is_over:
            progress.add_advice(advice.on_end(progress.looks, progress.best, self.settings))

    def _stop(self, found: _NonFinite) -> None:
        """End the run with the best prompt so far."""
        progress = self._progress
        if not progress.looks:
            raise NonFiniteLogits(
                "the prompt that training starts from gives a loss that is not finite; choose another init, "
                "or --precision float32"
            )
        progress.is_over = True
        progress.add_advice(advice.on_non_finite(found.what, found.step, progress.best.step, self.settings))

    def _autocast(self) -> torch.autocast:
        """Return the context of forward passes: bf16 where the settings or the hardware have it."""
        device = self.base.model.device
        dtype = choose_dtype(self.settings.precision, device)
        return torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16)

    def _identity(self) -> dict[str, str]:
        """Return by name what a checkpoint must have been made with."""
        settings = {name: str(value) for name, value in self.settings.model_dump(mode="json").items()}
        data = {"training data": _digest(self.train), "dev data": _digest(self._dev.encoded)}
        base = {"base": f"{self.base.name} ({self.base.geometry.fingerprint[:12]})"}
        return settings | data | base | dict(self.origin)


def _digest(examples: Sequence[EncodedExample]) -> str:
    found = hashlib.sha256()
    for example in examples:
        found.update(repr((example.source, example.target, example.task)).encode())
    return found.hexdigest()[:16]
