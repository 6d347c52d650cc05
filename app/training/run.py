"""The nouns of a run: who answers at a look, what is reported, and what comes out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from app.prompt import Prompt
from app.training.examples import Example


class Answerer(Protocol):
    """Generates as serving does, greedily. Training knows the engine as this alone."""

    def answers(self, prompt: Prompt | None, examples: Sequence[Example]) -> list[str]:
        """Return the answer to each example's inputs; `prompt` None: of the bare base."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One optimizer step."""

    step: int  # from 1
    loss: float  # mean over the answers' tokens
    learning_rate: float
    grad_norm: float  # before clipping
    num_tokens: int  # that the base read: sources and answers, without padding
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DevRecord:
    """One look at the dev set; scores are between 0 and 1, by metric."""

    step: int  # after this one; 0: the prompt that training starts from
    loss: float  # mean over the answers' tokens
    scores: dict[str, float]  # the main one first; none where no answers are generated
    is_best: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class History:
    """What a run has reported so far."""

    steps: tuple[StepRecord, ...] = ()
    looks: tuple[DevRecord, ...] = ()
    advice: tuple[str, ...] = ()


class Listener(Protocol):
    """Is called with what happens, on the training thread: progress bars, files, curves."""

    def on_start(self, history: History) -> None:
        """Begin; a resumed run has a history, which replaces whatever was reported after it."""
        ...

    def on_step(self, record: StepRecord) -> None:
        """Take note of a step."""
        ...

    def on_dev(self, record: DevRecord) -> None:
        """Take note of a look at the dev set."""
        ...

    def on_advice(self, line: str) -> None:
        """Show a line: a loss that doesn't move, a run that ended early, and what to do about it."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingResult:
    """The best prompt of a run, and how it came about."""

    prompts: tuple[Prompt, ...]  # of each task that learned; of one, but for method multitask
    best_step: int  # 0: the prompt that training started from
    history: History

    @property
    def prompt(self) -> Prompt:
        """Return the prompt of the first task."""
        return self.prompts[0]
