"""A look at the dev set: the loss of its answers, and the scores of what is generated in their place."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from app.prompt import Prompt
from app.scoring.items import Outcome
from app.scoring.measures import measure
from app.training.examples import EncodedExample, Example
from app.training.run import Answerer


class Objective(Protocol):
    """What training lowers."""

    def loss(self, examples: Sequence[EncodedExample]) -> tuple[Tensor, int]:
        """Return the sum of the losses of the targets' tokens, with gradient, and their number."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DevSet:
    """Examples that are looked at."""

    encoded: Sequence[EncodedExample]
    examples: Sequence[Example] = ()  # the same ones, to be answered; none: the loss alone is looked at
    choices: Sequence[str] = ()  # the task's labels

    def sample(self, number: int, seed: int) -> "DevSet":
        """Return so many examples, always the same ones for a seed, short before long."""
        count = len(self.encoded)
        indices = random.Random(seed).sample(range(count), min(number, count))
        indices.sort(key=lambda index: size(self.encoded[index]))
        return DevSet(
            encoded=[self.encoded[index] for index in indices],
            examples=[self.examples[index] for index in indices] if self.examples else (),
            choices=self.choices,
        )

    @torch.no_grad()
    def loss(self, objective: Objective, batch_size: int) -> float:
        """Return the mean over the targets' tokens."""
        total, num_tokens = 0.0, 0
        for start in range(0, len(self.encoded), batch_size):
            loss, count = objective.loss(self.encoded[start : start + batch_size])
            total += float(loss)
            num_tokens += count
        return total / num_tokens

    def scores(self, answerer: Answerer, prompts: Sequence[Prompt]) -> dict[str, float]:
        """Return the metrics of generated answers, the main one first; `prompts` are those of each task."""
        if not self.examples:
            return {}
        outcomes = [
            Outcome(example.item, answer)
            for task, prompt in enumerate(prompts)
            if (examples := self._of_task(task))
            for example, answer in zip(examples, answerer.answers(prompt, examples), strict=True)
        ]
        measures = measure(outcomes, self.choices)
        return {measures.main: measures.values[measures.main]} | measures.values

    def _of_task(self, task: int) -> list[Example]:
        pairs = zip(self.examples, self.encoded, strict=True)
        return [example for example, encoded in pairs if encoded.task == task]


def size(example: EncodedExample) -> int:
    """Return the tokens that the base reads."""
    return len(example.source) + len(example.target)
