"""Our training loop and plain PEFT loops on the same work: the sides of `benchmarks.training`.

PEFT's loop is the one that its documentation shows: right-padded batches, labels -100 outside the answers,
autocast, AdamW, cosine schedule, clipping. B examples of n tokens.
"""

import itertools
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

from app.models.placement import choose_dtype
from app.training.base import TrainingBase, load_training_base, training_base
from app.training.batches import BatchOrder
from app.training.dev_set import DevSet, size
from app.training.encoding import encode_examples
from app.training.examples import EncodedExample, Example
from app.training.loop import Trainer
from app.training.prompts import new_prompt
from app.training.run import DevRecord, History, StepRecord
from app.training.settings import TrainingSettings
from benchmarks.processes import MemoryWatch

_DEMO = Path(__file__).parent.parent / "demo"
_LAYERS = {"12x768": LlamaConfig(
    num_hidden_layers=12, hidden_size=768, num_attention_heads=12, num_key_value_heads=12,
    intermediate_size=2048, vocab_size=32_000, max_position_embeddings=1024, tie_word_embeddings=True,
)}  # fmt: skip
BASES = ("demo", *_LAYERS)
METHODS = ("prompt", "prefix")
TASKS = ("intent", "table-to-text")
_STEPS = 1_000_000  # of the schedule, which no measurement reaches


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingWork:
    """Which prompt is trained, on what."""

    base: str
    task: str
    method: str
    precision: str
    num_virtual_tokens: int = 16
    batch_size: int = 16

    @property
    def label(self) -> str:
        """What tells it from other works."""
        return f"{self.base}, {self.method}, {self.task}, {self.precision}"

    @property
    def settings(self) -> TrainingSettings:
        """Return the settings of the run."""
        return TrainingSettings.model_validate(
            {
                "method": self.method,
                "init": "vocabulary" if self.method == "prompt" else "text",
                "num_virtual_tokens": self.num_virtual_tokens,
                "batch_size": self.batch_size,
                "precision": self.precision,
                "learning_rate": 1e-3,
                "schedule": "cosine",
                "steps": _STEPS,
                "eval_every": _STEPS,
            }
        )


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side did in one turn."""

    tokens: int  # that the base read, without padding
    seconds: float
    cpu_seconds: float  # of the process, which others on the machine change little
    losses: tuple[float, ...]
    extra_memory: int  # bytes above what the process had with the base loaded, at the peak


def base_of(work: TrainingWork) -> TrainingBase:
    """Return the base, with the weights in the dtype of the forward pass; random ones are always the same."""
    if work.base == "demo":
        reference = str(_DEMO / "demo-causal")
        return load_training_base(reference, dtype=work.precision, device="cpu", progress=lambda _: None)
    torch.manual_seed(0)
    model = LlamaForCausalLM(_LAYERS[work.base])
    nn.Module.to(model, choose_dtype(work.precision, torch.device("cpu")))
    model.eval().requires_grad_(False)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(_DEMO / "demo-causal")
    return training_base(work.base, model, tokenizer, eos_ids=frozenset({0}), fingerprint="random")


def examples_of(work: TrainingWork, base: TrainingBase) -> list[EncodedExample]:
    """Return the held-out examples of a task of the demo, which are trained on here."""
    template = json.loads((_DEMO / "prompts" / work.task / "task.json").read_text())["template"]
    lines = (_DEMO / "heldout" / f"{work.task}.jsonl").read_text().splitlines()
    examples = [
        Example(inputs={"text": each["inputs"]}, output=each["expected"]) for each in map(json.loads, lines)
    ]
    return encode_examples(examples, base, template)


class Silent:
    """A listener that keeps the steps of the last turn."""

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []

    def on_start(self, history: History) -> None:
        """Forget the turn before."""
        self.steps = []

    def on_step(self, record: StepRecord) -> None:
        """Keep a step."""
        self.steps.append(record)

    def on_dev(self, record: DevRecord) -> None:
        """No look is measured."""

    def on_advice(self, line: str) -> None:
        """Nor is advice."""


class Ours:
    """`app.training.loop`."""

    name = "promptplex"
    uses_prompts = True

    def __init__(self, work: TrainingWork) -> None:
        self.work = work
        base = base_of(work)
        self._listener = Silent()
        train = examples_of(work, base)
        self._trainer = Trainer(
            base=base,
            learned=new_prompt(work.settings, base),
            settings=work.settings,
            train=train,
            dev=DevSet(encoded=train[:1]),
            listener=self._listener,
        )
        self._step = 0
        self._trainer.run(until=0)  # the look before the first step

    def train(self, steps: int) -> Turn:
        """Go on for so many steps."""
        self._step += steps
        with MemoryWatch() as memory:
            began, cpu = time.perf_counter(), time.process_time()
            self._trainer.run(until=self._step)
            seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        records = self._listener.steps[-steps:]
        tokens = sum(each.num_tokens for each in records)
        return Turn(tokens, seconds, cpu, tuple(each.loss for each in records), memory.extra)

    def close(self) -> None:
        """Nothing to free."""


class PeftLoop:
    """PEFT and a loop, over shuffled batches, or over the very batches of ours."""

    uses_prompts = True

    def __init__(self, work: TrainingWork, *, our_batches: bool) -> None:
        self.name = "PEFT loop, our batches" if our_batches else "PEFT loop"
        self.work = work
        base = base_of(work)
        self._examples = examples_of(work, base)
        kind = PromptTuningConfig if work.method == "prompt" else PrefixTuningConfig
        learned = new_prompt(work.settings, base)
        self._model = get_peft_model(
            base.model, kind(task_type="CAUSAL_LM", num_virtual_tokens=work.num_virtual_tokens)
        )
        self._parameters = [each for each in self._model.parameters() if each.requires_grad]
        with torch.no_grad():
            self._parameters[0].copy_(next(learned.parameters()))
        self._optimizer = torch.optim.AdamW(self._parameters, lr=1e-3, weight_decay=0.0)
        self._schedule = get_cosine_schedule_with_warmup(self._optimizer, 0, _STEPS)
        self._batches = self._ours() if our_batches else self._shuffled()
        self._is_bf16 = choose_dtype(work.precision, torch.device("cpu")) is torch.bfloat16

    def _shuffled(self) -> Iterator[list[int]]:
        chance, order = random.Random(0), list(range(len(self._examples)))
        while True:
            chance.shuffle(order)
            for start in range(0, len(order), self.work.batch_size):
                yield order[start : start + self.work.batch_size]

    def _ours(self) -> Iterator[list[int]]:
        order = BatchOrder([size(each) for each in self._examples], self.work.batch_size, 0)
        return map(order.batch, itertools.count())

    def train(self, steps: int) -> Turn:
        """Go on for so many steps."""
        tokens, losses = 0, []
        with MemoryWatch() as memory:
            began, cpu = time.perf_counter(), time.process_time()
            for indices in itertools.islice(self._batches, steps):
                batch = [self._examples[index] for index in indices]
                losses.append(self._step(batch))
                tokens += sum(map(size, batch))
            seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        return Turn(tokens, seconds, cpu, tuple(losses), memory.extra)

    def _step(self, batch: Sequence[EncodedExample]) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=self._is_bf16):
            loss: Tensor = self._model(**_collated(batch)).loss
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()
        return loss.item()

    def close(self) -> None:
        """Nothing to free."""


def _collated(batch: Sequence[EncodedExample]) -> dict[str, Any]:
    """Return tensors `[B, n]`, padded on the right; labels are -100 outside the answers."""
    rows = [torch.tensor([*each.source, *each.target]) for each in batch]
    labels = [torch.tensor([*[-100] * len(each.source), *each.target]) for each in batch]
    pad = nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(rows, batch_first=True),
        "attention_mask": pad([torch.ones_like(row) for row in rows], batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=-100),
    }


def make_ours(work: TrainingWork) -> list[Ours]:
    """Build our side in its process."""
    return [Ours(work)]


def make_peft(work: TrainingWork, our_batches: bool) -> list[PeftLoop]:
    """Build a PEFT side in its process."""
    return [PeftLoop(work, our_batches=our_batches)]
