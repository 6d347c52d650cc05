"""Distillation: answers to learn from a teacher's distribution instead of from the tokens alone.

N target tokens, k of the teacher's most probable ones at each of them, V the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from app.training.examples import EncodedExample
from app.training.prompted_model import PromptedModel


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TaughtExample(EncodedExample):
    """An example whose target has the teacher's most probable tokens, and their log-probabilities."""

    top_ids: Tensor  # int64 [T, k]
    top_logprobs: Tensor  # float32 [T, k]


def taught(example: EncodedExample, logits: Tensor, top_k: int) -> TaughtExample:
    """Return the example with what the teacher's `logits [T, V]` before each target token say."""
    logprobs, ids = logits.float().log_softmax(-1).topk(min(top_k, logits.shape[-1]))
    return TaughtExample(
        source=example.source, target=example.target, top_ids=ids.cpu(), top_logprobs=logprobs.cpu()
    )


class Distillation:
    """What training lowers: how far the prompted base is from the teacher, at the targets' tokens."""

    def __init__(self, student: PromptedModel) -> None:
        self._student = student

    def loss(self, examples: Sequence[EncodedExample]) -> tuple[Tensor, int]:
        """Return the sum over the target tokens, with gradient, and their number. All examples are taught."""
        lessons = [example for example in examples if isinstance(example, TaughtExample)]
        assert len(lessons) == len(examples), "an example has no teacher"
        count = sum(len(example.target) for example in lessons)
        return divergence(self._student.logits(lessons), lessons), count


def divergence(logits: Tensor, examples: Sequence[TaughtExample]) -> Tensor:
    """Return the sum over all target tokens of KL(teacher, student), with gradient.

    It runs over the teacher's top k, as in the paper (Eyuboglu et al., 2025); with k = V it is complete.
    `logits [N, V]` are the student's, in the order of the examples.
    """
    ids = torch.cat([example.top_ids for example in examples]).to(logits.device)
    teacher = torch.cat([example.top_logprobs for example in examples]).to(logits.device)
    student = logits.float().log_softmax(-1).gather(-1, ids)
    return (teacher.exp() * (teacher - student)).sum()
