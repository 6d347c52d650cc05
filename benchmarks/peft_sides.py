"""PEFT: one adapter is active at a time, so requests go one by one, or grouped by task."""

import time
from collections.abc import Callable, Sequence
from typing import cast

import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.sides import Answer
from benchmarks.transformers_sides import generate_batch_of
from benchmarks.work import Ask, Work


class PeftPrompts:
    """One PeftModel that holds the prompts of all works; adapters are named `<p>-<task>`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._base = model
        self._model: PeftModel | None = None
        self.device = model.device

    def add(self, work: Work, prompts: Sequence[Tensor]) -> None:
        """Take in the prompts `[p, d]` of a work, unless they are there."""
        for task, rows in enumerate(prompts):
            self._add(f"{work.virtual_tokens}-{task}", rows)

    def _add(self, name: str, rows: Tensor) -> None:
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(rows))
        if self._model is None:
            model = get_peft_model(self._base, config, adapter_name=name)
            assert isinstance(model, PeftModel)
            self._model = model
        elif name not in self._model.peft_config:
            self._model.add_adapter(name, config)
        self._model.get_parameter(f"prompt_encoder.{name}.embedding.weight").data.copy_(rows)
        self._model.eval()

    def activate(self, work: Work, task: int) -> Callable[..., Tensor]:
        """`generate` with one task's prompt."""
        assert self._model is not None
        self._model.set_adapter(f"{work.virtual_tokens}-{task}")
        return cast(Callable[..., Tensor], self._model.generate)


class PeftGrouped:
    """As few calls as PEFT allows: one for each task, with all of its requests.

    Task follows task, so how many wait changes nothing about the rate: it takes a sample of two tasks.
    """

    name = "PEFT, grouped by task"
    uses_prompts = True
    _SAMPLE = 2

    def __init__(self, peft: PeftPrompts, work: Work) -> None:
        self._peft = peft
        self.work = work

    @torch.inference_mode()
    def run(self, asks: Sequence[Ask]) -> list[Answer]:
        """Task after task."""
        answers = []
        for task in sorted({ask.task for ask in asks})[: self._SAMPLE]:
            generate = self._peft.activate(self.work, task)
            group = [ask for ask in asks if ask.task == task]
            answers += generate_batch_of(generate, group, self.work, time.perf_counter(), self._peft.device)
        return [Answer(token_ids=answer.token_ids) for answer in answers]

    def close(self) -> None:
        """Nothing to free."""


class PeftOneAtATime:
    """A call for each request, in the order in which they come; of a sample of two tasks, as above.

    Times to the first token would say how long the sample is, so none are given.
    """

    name = "PEFT, one at a time"
    uses_prompts = True
    _SAMPLE = 2

    def __init__(self, peft: PeftPrompts, work: Work) -> None:
        self._peft = peft
        self.work = work

    def sample(self, asks: Sequence[Ask]) -> Sequence[Ask]:
        """The first ones, whose tasks differ where there are as many."""
        first_of_task = {ask.task: ask for ask in reversed(asks)}
        return list(first_of_task.values())[: self._SAMPLE]

    @torch.inference_mode()
    def run(self, asks: Sequence[Ask]) -> list[Answer]:
        """Request after request."""
        answers = []
        for ask in self.sample(asks):
            generate = self._peft.activate(self.work, ask.task)
            alone = generate_batch_of(generate, [ask], self.work, time.perf_counter(), self._peft.device)
            answers.append(Answer(token_ids=alone[0].token_ids))
        return answers

    def close(self) -> None:
        """Nothing to free."""
