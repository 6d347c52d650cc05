"""The demo's base models, as data: how each is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from demo.recipes import causal, seq2seq
from demo.recipes.schedule import PretrainConfig

_ENDS = {"eos_token_id": 0, "pad_token_id": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A base of ``demo/<name>``. ``losses`` gives a step's loss in parts that add up to it."""

    name: str
    pretraining: PretrainConfig
    make_model: Callable[[], PreTrainedModel]
    prepare: Callable[[PretrainConfig, Path], Any]
    losses: Callable[[PreTrainedModel, Any, torch.Tensor], Iterator[torch.Tensor]]
    generation: dict[str, int]
    rate_scale: Callable[[str], float] = lambda _: 1.0  # of the learning rate, by a parameter's name

    @property
    def path(self) -> Path:
        return Path("demo") / self.name


_ALL = (
    Base(
        name="demo-causal",
        pretraining=PretrainConfig(),
        make_model=causal.make_model,
        prepare=causal.prepare,
        losses=causal.losses,
        generation=_ENDS,
    ),
    Base(
        name="seq2seq",
        pretraining=PretrainConfig(steps=5900, rows_per_step=64, num_documents=380_000),
        rate_scale=seq2seq.t5_rate_scale,
        make_model=seq2seq.make_t5,
        prepare=seq2seq.prepare,
        losses=seq2seq.losses,
        generation=_ENDS | seq2seq.START,
    ),
    Base(
        name="seq2seq-bart",
        pretraining=PretrainConfig(
            steps=3400, rows_per_step=64, num_documents=200_000, learning_rate=1e-3, warmup=300
        ),
        make_model=seq2seq.make_bart,
        prepare=seq2seq.prepare,
        losses=seq2seq.losses,
        generation=_ENDS | seq2seq.START,
    ),
)
BASES = {base.name: base for base in _ALL}
