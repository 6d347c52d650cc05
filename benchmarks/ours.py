"""Promptplex's engine: all requests at once, tasks mixed."""

import time
from collections.abc import Sequence
from concurrent.futures import Future

import torch
from torch import Tensor
from transformers import PreTrainedModel

from app.engine.engine import Engine, EngineConfig
from app.engine.plan import StepStats
from app.models.acceleration import accelerate
from app.models.attention.packed import IMPLEMENTATION, register
from app.models.decoder_only import DecoderOnly
from app.models.geometry import model_geometry
from app.prompt import Prompt, PromptKind
from app.request import Request
from app.store.canonical import RawTensor, read_prompt, write_prompt
from benchmarks.sides import Answer
from benchmarks.work import Ask, Work, embedding_width

_SECONDS = 600.0  # no run takes as long; a hanging one must end


class MemorySource:
    """A PromptSource that holds every prompt already."""

    def __init__(self) -> None:
        self._prompts: dict[str, Prompt] = {}

    def add(self, rows: Tensor) -> str:
        """Take in a soft prompt `[p, d]` as the store would hold it; its digest."""
        data = rows.contiguous().view(torch.uint8).numpy().tobytes()
        raw = RawTensor("BF16", tuple(rows.shape), data)
        prompt = read_prompt(write_prompt(PromptKind.SOFT, {"dec.embeds": raw}))
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
        accelerate(model, model.dtype, model.device)  # as load_base does
        config = EngineConfig(
            max_rows=max(work.requests for work in works), kv_cache_bytes=sum(map(_kv_bytes, works))
        )
        self.engine = Engine(backbone, self.source, config, on_step=self.steps.append)
        self.engine.start()

    def close(self) -> None:
        """End its thread."""
        self.engine.stop()


class Promptplex:
    """The engine on one work."""

    name = "Promptplex"
    uses_prompts = True

    def __init__(self, shared: SharedEngine, work: Work, prompts: Sequence[Tensor]) -> None:
        self._shared = shared
        self._work = work
        self._digests = [shared.source.add(rows) if work.virtual_tokens else None for rows in prompts]

    def select(self, asks: Sequence[Ask]) -> Sequence[Ask]:
        """All."""
        return asks

    def run(self, asks: Sequence[Ask]) -> list[Answer]:
        """Submit all, wait for all."""
        self._shared.steps.clear()
        requests = [self._request(number, ask) for number, ask in enumerate(asks)]
        futures = [self._shared.engine.submit(request) for request in requests]
        completions = [future.result(timeout=_SECONDS) for future in futures]
        answers = []
        for completion in completions:
            first = completion.timings.queue + completion.timings.prefill
            last = first + completion.timings.decode
            answers.append(Answer(token_ids=completion.token_ids, first_token=first, last_token=last))
        return answers

    def decode_steps(self) -> list[float]:
        """Seconds of the last run's steps in which all requests decoded and nothing else happened."""
        full = (step for step in self._shared.steps if step.num_decode_rows == self._work.requests)
        return [step.duration for step in full if not step.num_prefill_tokens + step.num_prefix_tokens]

    def close(self) -> None:
        """The engine is shared; it ends with the run."""

    def _request(self, number: int, ask: Ask) -> Request:
        digest = self._digests[ask.task]
        return Request(
            id=f"{time.perf_counter_ns()}-{number}",
            token_ids=ask.token_ids,
            prompt_digest=digest,
            num_virtual_tokens=0 if digest is None else self._work.virtual_tokens,
            max_new_tokens=self._work.new_tokens,
            task=str(ask.task),
        )


def _kv_bytes(work: Work) -> int:
    """Room for every request and every prompt, twice: scarcity isn't what is measured here."""
    own = work.requests * (work.prompt_tokens + work.new_tokens)
    return 2 * work.shape.kv_bytes_per_token * (own + work.tasks * work.virtual_tokens + 4096)
