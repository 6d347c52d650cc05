"""How far a run is: its step, its records and its best prompt, reported, saved and taken up again."""

import time
from dataclasses import replace
from pathlib import Path

from torch.optim import Optimizer

from app.prompt import Prompt
from app.store.prompt_file import read_prompt
from app.training.checkpoint import Checkpoint, Identity, load_checkpoint, save_checkpoint
from app.training.early_stopping import best_look, rank
from app.training.prompts import LearnedPrompt
from app.training.run import DevRecord, History, Listener, StepRecord, TrainingResult


class Progress:
    """A run after a step. Every change is reported to the listener."""

    def __init__(self, listener: Listener, directory: Path | None, identity: Identity) -> None:
        """`directory` has the checkpoints; None: there are none."""
        self.step = 0
        self.looks: list[DevRecord] = []
        self.advice: list[str] = []
        self.is_over = False
        self._steps: list[StepRecord] = []
        self._best: tuple[Prompt, ...] = ()
        self._listener = listener
        self._directory = directory
        self._identity = identity
        self._saved_at = time.monotonic()

    @property
    def best(self) -> DevRecord:
        """Return the best look so far."""
        return best_look(self.looks)

    def add_step(self, record: StepRecord) -> None:
        """Go on to the next step."""
        self.step = record.step
        self._steps.append(record)
        self._listener.on_step(record)

    def add_look(self, record: DevRecord, prompts: tuple[Prompt, ...]) -> None:
        """Take note of a look; keep its prompts if no earlier ones were as good."""
        if not self.looks or rank(record) > rank(self.best):
            record, self._best = replace(record, is_best=True), prompts
        self.looks.append(record)
        self._listener.on_dev(record)

    def add_advice(self, line: str | None) -> None:
        """Show a line, if there is one."""
        if line:
            self.advice.append(line)
            self._listener.on_advice(line)

    def result(self) -> TrainingResult:
        """Return the best prompts, and all records."""
        return TrainingResult(prompts=self._best, best_step=self.best.step, history=self._history())

    def resume(self, learned: LearnedPrompt, optimizer: Optimizer) -> None:
        """Take up the newest checkpoint, if there is one. Raise CorruptData, Conflict."""
        found = load_checkpoint(self._directory, self._identity) if self._directory else None
        if found is not None:
            learned.load_state_dict(found.learned)
            optimizer.load_state_dict(found.optimizer)
            self.step, self.is_over = found.step, found.is_over
            self._steps, self.looks = [*found.history.steps], [*found.history.looks]
            self.advice = [*found.history.advice]
            self._best = tuple(map(read_prompt, found.best))
        self._listener.on_start(self._history())

    def save(self, learned: LearnedPrompt, optimizer: Optimizer, *, min_seconds: float = 0.0) -> None:
        """Write a checkpoint, unless the last one is that young. Raise StoreFull."""
        if self._directory is None or time.monotonic() - self._saved_at < min_seconds:
            return
        checkpoint = Checkpoint(
            step=self.step,
            learned=learned.state_dict(),
            optimizer=optimizer.state_dict(),
            history=self._history(),
            best=tuple(prompt.data for prompt in self._best),
            is_over=self.is_over,
        )
        save_checkpoint(self._directory, self._identity, checkpoint)
        self._saved_at = time.monotonic()

    def _history(self) -> History:
        return History(tuple(self._steps), tuple(self.looks), tuple(self.advice))
