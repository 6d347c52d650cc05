"""Promptplex's engine on random weights, with prompts at hand."""

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from app.engine.engine import Engine, EngineConfig
from app.engine.statistics import StepStats
from app.models.attention.packed import IMPLEMENTATION, register
from app.models.backbones import AnyBackbone, backbone_of
from app.models.cpu.acceleration import accelerate
from app.models.geometry import model_geometry
from app.prompt import Prompt, PromptKind, TaskType
from app.sites import Embedding
from app.store.prompt_file import make_prompt
from app.store.safetensors_file import RawTensor
from benchmarks.work import Work, embedding_width


class MemorySource:
    """A PromptSource that holds every prompt already."""

    def __init__(self) -> None:
        self._prompts: dict[str, Prompt] = {}

    def add(self, rows: Tensor, task_type: TaskType = TaskType.CAUSAL_LM) -> str:
        """Take in a soft prompt `[p, d]` as the store would hold it; its digest.

        It comes before the text, which an encoder-decoder's encoder reads.
        """
        data = rows.contiguous().view(torch.uint8).numpy().tobytes()
        raw = RawTensor("BF16", tuple(rows.shape), data)
        place = Embedding.DECODER if task_type is TaskType.CAUSAL_LM else Embedding.ENCODER
        prompt = make_prompt(PromptKind.SOFT, {place: raw}, task_type=task_type)
        self.keep(prompt)
        return prompt.digest

    def keep(self, prompt: Prompt) -> None:
        """Take in a prompt as it is."""
        self._prompts[prompt.digest] = prompt

    def load(self, digest: str) -> "Future[Prompt]":
        """At once: nothing is read from anywhere."""
        future: Future[Prompt] = Future()
        future.set_result(self._prompts[digest])
        return future


def accelerated(model: PreTrainedModel) -> AnyBackbone:
    """Put a model behind our attention, and make it fast, as load_base does."""
    register()
    model.set_attn_implementation(IMPLEMENTATION)
    backbone = backbone_of(model, model_geometry(model, "benchmark"))
    accelerate(backbone)
    return backbone


class SharedEngine:
    """One engine for all works of a run, as a server has; it times its own steps."""

    def __init__(
        self,
        model: PreTrainedModel,
        works: Sequence[Work],
        *,
        backbone: AnyBackbone | None = None,
        source: MemorySource | None = None,
        **settings: Any,
    ) -> None:
        """`backbone` is the model's, where it has one already; `settings` are fields of EngineConfig."""
        self.embedding_width = embedding_width(model)
        self.source = source or MemorySource()
        self.steps: list[StepStats] = []
        config = EngineConfig(
            **{"max_rows": max(work.rows for work in works), "kv_cache_bytes": _kv_bytes(works)} | settings
        )
        backbone = backbone or accelerated(model)
        self.engine = Engine(backbone, self.source, config, on_step=self.steps.append)
        self.engine.start()

    def close(self) -> None:
        """End its thread."""
        self.engine.stop()


def _kv_bytes(works: Sequence[Work]) -> int:
    """Room for the requests of a work and all prompts, twice: scarcity isn't what is measured here."""
    prompts = sum(work.tasks * work.virtual_tokens for work in works)
    slots = max(work.slots for work in works) + prompts + 4096
    return 2 * works[0].shape.kv_bytes_per_token * slots
