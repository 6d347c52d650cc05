"""Sides in this Python: our engine, PEFT, and transformers' padded batch without prompts."""

import time
from collections.abc import Callable, Sequence
from typing import cast

import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from app.prompt import TaskType
from app.request import Request, SamplingParams, Source
from benchmarks.encoder_decoder.work import SourceWork, encoder_prompts, random_encoder_decoder
from benchmarks.ours import Promptplex
from benchmarks.shared_engine import SharedEngine
from benchmarks.sides import Answer, Side
from benchmarks.work import Ask

_SAMPLE = 2  # requests or tasks that PEFT runs one after the other; how many wait doesn't change the rate


class Seq2SeqPromptplex(Promptplex):
    """Our engine on an encoder-decoder: all requests at once, tasks mixed."""

    work: SourceWork
    _TASK_TYPE = TaskType.SEQ_2_SEQ_LM

    def _requests(self, number: int, ask: Ask) -> list[Request]:
        name = f"{time.perf_counter_ns()}-{number}"
        source = Source(
            id=name,
            token_ids=ask.token_ids,
            prompt_digest=self._digests[ask.task],
            num_virtual_tokens=self.work.virtual_tokens,
        )
        request = Request(
            id=name,
            token_ids=(self.work.shape.start_id,),
            source=source,
            sampling=SamplingParams(num_beams=self.work.num_beams),
            max_new_tokens=self.work.new_tokens,
            task=str(ask.task),
        )
        return [request]


def generate_batch(generate: Callable[..., Tensor], asks: Sequence[Ask], work: SourceWork) -> list[Answer]:
    """Answer texts of equal length: no padding, the best case of a padded batch."""
    ids = torch.tensor([ask.token_ids for ask in asks])
    output = generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=work.new_tokens,
        do_sample=False,
        num_beams=work.num_beams,
        eos_token_id=None,
    )
    return [Answer(token_ids=tuple(row)) for row in output[:, 1:].tolist()]


class PeftPrompts:
    """One PeftModel that holds all tasks' soft prompts."""

    def __init__(self, base: PreTrainedModel, prompts: Sequence[Tensor]) -> None:
        config = PromptTuningConfig(
            task_type="SEQ_2_SEQ_LM", num_virtual_tokens=len(prompts[0]), num_transformer_submodules=1
        )
        model = get_peft_model(base, config, adapter_name="0")
        assert isinstance(model, PeftModel)
        for task, rows in enumerate(prompts):
            if task:
                model.add_adapter(str(task), config)
            model.get_parameter(f"prompt_encoder.{task}.embedding.weight").data.copy_(rows)
        model.eval()
        self._model = model

    def activate(self, task: int) -> Callable[..., Tensor]:
        """Return `generate` with one task's prompt."""
        self._model.set_adapter(str(task))
        return cast(Callable[..., Tensor], self._model.generate)


class PeftOneAtATime:
    """A call for each request of a sample, in the order in which they come."""

    name = "PEFT, one at a time"
    uses_prompts = True

    def __init__(self, peft: PeftPrompts, work: SourceWork) -> None:
        self._peft = peft
        self.work = work

    @torch.inference_mode()
    def run(self, asks: Sequence[Ask]) -> list[Answer]:
        """Request after request."""
        return [
            answer
            for ask in asks[:_SAMPLE]
            for answer in generate_batch(self._peft.activate(ask.task), [ask], self.work)
        ]

    def close(self) -> None:
        """Nothing to free."""


class PeftGrouped:
    """As few calls as PEFT allows: one for each task, with all of its requests."""

    name = "PEFT, grouped by task"
    uses_prompts = True

    def __init__(self, peft: PeftPrompts, work: SourceWork) -> None:
        self._peft = peft
        self.work = work

    @torch.inference_mode()
    def run(self, asks: Sequence[Ask]) -> list[Answer]:
        """Task after task, of a sample."""
        answers = []
        for task in sorted({ask.task for ask in asks})[:_SAMPLE]:
            group = [ask for ask in asks if ask.task == task]
            answers += generate_batch(self._peft.activate(task), group, self.work)
        return answers

    def close(self) -> None:
        """Nothing to free."""


class PaddedBatch:
    """`model.generate` on all requests at once: what a batch costs where there is nothing to switch."""

    name = "transformers generate, no prompts"
    uses_prompts = False

    def __init__(self, model: PreTrainedModel, work: SourceWork) -> None:
        self.work = work
        self._generate = cast(Callable[..., Tensor], model.generate)

    @torch.inference_mode()
    def run(self, asks: Sequence[Ask]) -> list[Answer]:
        """One call."""
        return generate_batch(self._generate, asks, self.work)

    def close(self) -> None:
        """Nothing to free."""


# Each runs in the process of its sides. The same seed gives all of them the same weights.


def build_ours(works: Sequence[SourceWork]) -> list[Side]:
    """One engine for all works."""
    model = random_encoder_decoder(works[0].shape)
    prompts = [encoder_prompts(model, work) for work in works]
    shared = SharedEngine(model, works)
    return [Seq2SeqPromptplex(shared, work, rows) for work, rows in zip(works, prompts, strict=True)]


def build_peft(works: Sequence[SourceWork]) -> list[Side]:
    """One PeftModel with all prompts."""
    model = random_encoder_decoder(works[0].shape)
    peft = PeftPrompts(model, encoder_prompts(model, works[0]))
    return [kind(peft, work) for work in works for kind in (PeftOneAtATime, PeftGrouped)]


def build_padded(works: Sequence[SourceWork]) -> list[Side]:
    """The bare model."""
    model = random_encoder_decoder(works[0].shape)
    return [PaddedBatch(model, work) for work in works]
