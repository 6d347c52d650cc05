"""A look at the dev set: the loss of its answers, and the scores of what is generated in their place."""

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from app.prompt import Prompt
from app.scoring.items import Outcome
from app.scoring.measures import Measures, measure
from app.training.examples import EncodedExample, Example
from app.training.run import Answerer, History

MEAN = "mean score"  # of the main scores of tasks that learn together


class Objective(Protocol):
    """What training lowers."""

    def loss(self, examples: Sequence[EncodedExample]) -> tuple[Tensor, int]:
        """Return the sum of the losses of the targets' tokens, with gradient, and their number."""
        ...


@dataclass(frozen=True, slots=True)
class DevTask:
    """How the answers of one of the tasks are generated and scored."""

    answerer: Answerer
    choices: Sequence[str] = ()  # the task's labels
    name: str = ""  # which several tasks have


@dataclass(frozen=True, slots=True, kw_only=True)
class DevSet:
    """Examples that are looked at."""

    encoded: Sequence[EncodedExample]
    examples: Sequence[Example] = ()  # the same ones, to be answered
    tasks: Sequence[DevTask] = ()  # none: the loss alone is looked at

    def sample(self, number: int, seed: int) -> "DevSet":
        """Return so many examples of each task, always the same ones for a seed, short before long."""
        indices = [
            index
            for task in sorted({each.task for each in self.encoded})
            for index in _drawn(self._of_task(task), number, seed)
        ]
        indices.sort(key=lambda index: size(self.encoded[index]))
        return replace(
            self,
            encoded=[self.encoded[index] for index in indices],
            examples=[self.examples[index] for index in indices] if self.examples else (),
        )

    def _of_task(self, task: int) -> list[int]:
        return [index for index, each in enumerate(self.encoded) if each.task == task]

    @torch.no_grad()
    def loss(self, objective: Objective, batch_size: int) -> float:
        """Return the mean over the targets' tokens."""
        total, num_tokens = 0.0, 0
        for start in range(0, len(self.encoded), batch_size):
            loss, count = objective.loss(self.encoded[start : start + batch_size])
            total += float(loss)
            num_tokens += count
        return total / num_tokens

    def scores(self, prompts: Sequence[Prompt]) -> dict[str, float]:
        """Return the metrics of generated answers, the main one first; `prompts` are those of each task.

        Of several tasks it is the mean of their main scores (`MEAN`), which follow as `NAME METRIC`.
        """
        found = {
            task.name: self._measures(task, prompts[number], indices)
            for number, task in enumerate(self.tasks)
            if (indices := self._of_task(number))
        }
        if len(self.tasks) == 1:
            return {name: value for each in found.values() for name, value in _main_first(each)}
        mains = {f"{name} {each.main}": each.values[each.main] for name, each in found.items()}
        return {MEAN: statistics.fmean(mains.values())} | mains if mains else {}

    def _measures(self, task: DevTask, prompt: Prompt, indices: Sequence[int]) -> Measures:
        examples = [self.examples[index] for index in indices]
        answers = task.answerer.answers(prompt, examples)
        outcomes = [Outcome(each.item, answer) for each, answer in zip(examples, answers, strict=True)]
        return measure(outcomes, task.choices)


def history_of_task(name: str, history: History) -> History:
    """Return the same with the scores of one of several tasks, beside the mean."""
    mark = f"{name} "
    looks = [
        replace(
            look,
            scores={
                metric.removeprefix(mark): value
                for metric, value in look.scores.items()
                if metric == MEAN or metric.startswith(mark)
            },
        )
        for look in history.looks
    ]
    return replace(history, looks=tuple(looks))


def _drawn(indices: Sequence[int], number: int, seed: int) -> list[int]:
    places = random.Random(seed).sample(range(len(indices)), min(number, len(indices)))
    return [indices[place] for place in places]


def _main_first(measures: Measures) -> list[tuple[str, float]]:
    return list(({measures.main: measures.values[measures.main]} | measures.values).items())


def size(example: EncodedExample) -> int:
    """Return the tokens that the base reads."""
    return len(example.source) + len(example.target)
