"""Small whole runs on tiny bases."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from app.prompt import Prompt
from app.sites import Embedding
from app.training.base import TrainingBase
from app.training.dev_set import DevSet, DevTask
from app.training.examples import EncodedExample, Example
from app.training.loop import Trainer
from app.training.prompts import new_prompt
from app.training.run import DevRecord, History, StepRecord, TrainingResult
from app.training.settings import TrainingSettings
from tests.training.bases import causal_base, examples

SETTINGS: dict[str, Any] = {
    "method": "prompt", "num_virtual_tokens": 3, "init": "vocabulary", "steps": 12, "eval_every": 4,
    "batch_size": 4, "learning_rate": 0.05, "hidden_size": 8, "num_eval": 6, "precision": "float32",
}  # fmt: skip


@dataclass
class Heard:
    """A listener that keeps everything."""

    starts: list[History] = field(default_factory=list)
    steps: list[StepRecord] = field(default_factory=list)
    looks: list[DevRecord] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    def on_start(self, history: History) -> None:
        self.starts.append(history)

    def on_step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def on_dev(self, record: DevRecord) -> None:
        self.looks.append(record)

    def on_advice(self, line: str) -> None:
        self.advice.append(line)


class Greedy:
    """Answers with a soft prompt by `generate` of transformers, one example at a time."""

    def __init__(self, base: TrainingBase) -> None:
        self._base = base

    def answers(self, prompt: Prompt | None, examples: Sequence[Example]) -> list[str]:
        assert prompt is not None
        data = bytearray(prompt.tensor_bytes(Embedding.DECODER))
        rows = torch.frombuffer(data, dtype=torch.float32).view(prompt.tensors[Embedding.DECODER].shape)
        return [self._answer(rows, example) for example in examples]

    @torch.no_grad()
    def _answer(self, rows: torch.Tensor, example: Example) -> str:
        model = self._base.model
        source = torch.tensor([[int(text) for text in str(example.inputs).split()]])
        embeds = torch.cat([rows[None], model.get_input_embeddings()(source)], dim=1)
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        ids = model.generate(
            inputs_embeds=embeds,
            attention_mask=mask,
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=1,
            pad_token_id=1,
        )
        return text_of(ids[0].tolist())


def text_of(ids: Sequence[int]) -> str:
    """Ids as a text, without EOS."""
    return " ".join(str(id_) for id_ in ids if id_ != 1)


def dev_set(base: TrainingBase, encoded: Sequence[EncodedExample]) -> DevSet:
    """The examples, written as ids."""
    return DevSet(
        encoded=encoded,
        examples=[
            Example(
                inputs=" ".join(map(str, each.source)),
                output=text_of(each.target),
            )
            for each in encoded
        ],
    )


def trainer(base: TrainingBase | None = None, settings: dict[str, Any] | None = None, **more: Any) -> Trainer:
    """A run of 12 steps on 20 examples, with four looks; `more` replaces what it is made of."""
    base = base or causal_base("llama")
    chosen = TrainingSettings.model_validate(SETTINGS | (settings or {}))
    made: dict[str, Any] = {
        "base": base,
        "learned": new_prompt(chosen, base),
        "settings": chosen,
        "train": examples(base, 20),
        "dev": dev_set(base, examples(base, 8, seed=1)),
        "listener": Heard(),
    }
    answerer = more.pop("answerer", Greedy(base) if chosen.method == "prompt" else None)
    tasks = more.pop("tasks", [DevTask(answerer)] if answerer else [])
    made |= more
    return Trainer(**made | {"dev": replace(made["dev"], tasks=tasks)})


def timeless(result: TrainingResult) -> TrainingResult:
    """The same without what a clock measured."""
    history = result.history
    steps = tuple(map(partial(replace, seconds=0.0), history.steps))
    looks = tuple(map(partial(replace, seconds=0.0), history.looks))
    return replace(result, history=replace(history, steps=steps, looks=looks))
