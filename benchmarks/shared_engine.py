"""Promptplex's engine on random weights, with prompts at hand."""

from collections.abc import Sequence
from concurrent.futures import Future

import torch
from torch import Tensor
from transformers import PreTrainedModel

from app.engine.engine import Engine, EngineConfig
from app.engine.statistics import StepStats
from app.models.attention.packed import IMPLEMENTATION, register
from app.models.cpu.acceleration import accelerate
from app.models.decoder_only import DecoderOnly
from app.models.geometry import model_geometry
from app.prompt import Prompt, PromptKind
from app.sites import Embedding
from app.store.prompt_file import make_prompt
from app.store.safetensors_file import RawTensor
from benchmarks.work import Work, embedding_width


class MemorySource:
    """A PromptSource that holds every prompt already."""

    def __init__(self) -> None:
        self._prompts: dict[str, Prompt] = {}

    def add(self, rows: Tensor) -> str:
        """Take in a soft prompt `[p, d]` as the store would hold it; its digest."""
        data = rows.contiguous().view(torch.uint8).numpy().tobytes()
        raw = RawTensor("BF16", tuple(rows.shape), data)
        prompt = make_prompt(PromptKind.SOFT, {Embedding.DECODER: raw})
        self._prompts[prompt.digest] = prompt
        return prompt.digest

    def load(self, digest: str) -> "Future[Prompt]":
        """At once: nothing is read from anywhere."""
        future: Future[Prompt] = Future()
        future.set_result(self._prompts[digest])
        return future


class SharedEngine:
    """One engine for all works of a run, as a server has; it times its own steps."""

    def __init__(self, model: PreTrainedModel, works: Sequence[Work]) -> None:
        register()
        model.set_attn_implementation(IMPLEMENTATION)
        self.source = MemorySource()
        self.steps: list[StepStats] = []
        geometry = model_geometry(model, "benchmark")
        backbone = DecoderOnly(model, geometry)
        self.embedding_width = embedding_width(model)
        accelerate(backbone.model)  # as load_base does
        config = EngineConfig(
            max_rows=max(work.requests for work in works), kv_cache_bytes=sum(map(_kv_bytes, works))
        )
        self.engine = Engine(backbone, self.source, config, on_step=self.steps.append)
        self.engine.start()

    def close(self) -> None:
        """End its thread."""
        self.engine.stop()


def _kv_bytes(work: Work) -> int:
    """Room for every request and every prompt, twice: scarcity isn't what is measured here."""
    own = work.requests * (work.prompt_tokens + work.new_tokens)
    return 2 * work.shape.kv_bytes_per_token * (own + work.tasks * work.virtual_tokens + 4096)
