"""transformers without prompts: one static batch, and its continuous batching."""

import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from benchmarks.sides import Answer
from benchmarks.work import Ask, Work

# Of the memory that is free. By default it takes nearly all, and other sides need theirs; the work's keys and
# values fit many times over all the same.
_MEMORY_SHARE = 0.15


class StepClock(StoppingCriteria):
    """Notes when each step of `generate` was done; never stops it."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def generate_batch_of(
    generate: Callable[..., Tensor],
    asks: Sequence[Ask],
    work: Work,
    began: float,
    device: torch.device | None = None,
) -> list[Answer]:
    """`generate` for requests of equal length: no padding, its best case."""
    clock = StepClock()
    ids = torch.tensor([ask.token_ids for ask in asks], device=device)
    output = generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=work.new_tokens,
        do_sample=bool(work.sampling),
        eos_token_id=None,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([clock]),
        **dict(work.sampling),
    )
    first, last = clock.times[0] - began, clock.times[-1] - began
    new = output[:, -work.new_tokens :].tolist()
    return [Answer(token_ids=tuple(row), first_token=first, last_token=last) for row in new]


class StaticBatch:
    """`model.generate` on all requests at once: what a batch costs where there is nothing to switch."""

    name = "transformers generate, no prompts"
    uses_prompts = False

    def __init__(self, model: PreTrainedModel, work: Work) -> None:
        self.work = work
        self._generate = cast(Callable[..., Tensor], model.generate)
        self._device = model.device

    @torch.inference_mode()
    def run(self, asks: Sequence[Ask]) -> list[Answer]:
        """One call."""
        return generate_batch_of(self._generate, asks, self.work, time.perf_counter(), self._device)

    def close(self) -> None:
        """Nothing to free."""


class ContinuousBatch:
    """`model.generate_batch`, its manager kept between calls, which spares it the start."""

    name = "transformers generate_batch, no prompts"
    uses_prompts = False

    def __init__(self, model: PreTrainedModel, work: Work) -> None:
        self.work = work
        # The annotations of transformers' mixins make mypy take these for tensors.
        self._generate = cast(Callable[..., dict[str, Any]], model.generate_batch)
        self._end = cast(Callable[[], None], model.destroy_cached_continuous_batching_manager)
        self._config = GenerationConfig(
            max_new_tokens=work.new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
        )

    def run(self, asks: Sequence[Ask]) -> list[Answer]:
        """One call."""
        began = time.perf_counter()
        outputs = self._generate(
            inputs=[list(ask.token_ids) for ask in asks],
            generation_config=self._config,
            continuous_batching_config=ContinuousBatchingConfig(max_memory_percent=_MEMORY_SHARE),
            record_timestamps=True,
            persistent_manager=True,
        )
        by_prompt = {tuple(output.prompt_ids): output for output in outputs.values()}
        return [self._answer(by_prompt[ask.token_ids], began) for ask in asks]

    @staticmethod
    def _answer(output: Any, began: float) -> Answer:
        times = output.timestamps or []
        return Answer(
            token_ids=tuple(output.generated_tokens),
            first_token=times[0] - began if times else None,
            last_token=times[-1] - began if times else None,
        )

    def close(self) -> None:
        """End the manager's thread."""
        self._end()
