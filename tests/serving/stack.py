"""A tiny llama behind the real store, engine and services, and prompts that PEFT itself saved."""

import asyncio
import copy
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from app.api.middleware.access_log import note_outcome
from app.engine.engine import Engine, EngineConfig
from app.engine.statistics import StepStats
from app.metrics import Metrics
from app.models.backbone import Backbone
from app.models.decoder_only import DecoderOnly
from app.models.geometry import model_geometry
from app.request import Outcome
from app.serving.base_defaults import base_defaults
from app.serving.generation import GenerationService
from app.serving.generation_request import GenerationRequest
from app.serving.parameters import DEFAULT_MAX_NEW_TOKENS
from app.serving.publishing.publisher import PublishingService
from app.serving.publishing.upload import Upload
from app.serving.structured_output.grammars import Grammars
from app.store.cache.prompt_cache import PromptCache
from app.store.prompt_store import PromptStore, open_store
from app.store.source_files import CONFIG, PROMPT
from tests.oracle import saved, tuned
from tests.text.tokenizer_zoo import tokenizer_of
from tests.tiny_models import packed_backbone, tiny_model

BASE_NAME = "tiny-base"
POSITIONS = 256
_T = TypeVar("_T")


@dataclass
class Stack:
    """Everything below the HTTP edge."""

    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    root: Path
    store: PromptStore
    source: PromptCache
    engine: Engine
    generation: GenerationService
    publishing: PublishingService
    metrics: Metrics
    outcomes: list[Outcome]
    steps: list[StepStats]

    def adapter(self, config: PeftConfig, directory: Path, seed: int = 1) -> tuple[PeftModel, bytes, bytes]:
        """A PEFT model with a strong random prompt, and the two files that it saves."""
        model = tuned(self.base, config, seed=seed)
        return model, *saved(model, directory)

    def talkative(self) -> str:
        """A text that the base goes on about for long."""
        for word in ("film", "food", "name", "Thai", "what", "area", "cold", "Door"):
            result = asyncio.run(self.generation.generate(GenerationRequest(inputs=word)))
            if len(result.tokens) == DEFAULT_MAX_NEW_TOKENS:
                return word
        raise AssertionError("the base is too terse")

    def is_idle(self) -> bool:
        """Whether no request runs or waits."""
        stats = self.engine.stats()
        return not (stats.num_running or stats.num_waiting)

    def files(self) -> dict[str, bytes]:
        """Every file of the store."""
        return {
            str(path.relative_to(self.root)): path.read_bytes()
            for path in self.root.rglob("*")
            if path.is_file()
        }


@contextmanager
def running_stack(
    root: Path,
    kind: str = "byte_level_bos",
    dtype: torch.dtype = torch.float32,
    padding: int = 0,
    positions: int = POSITIONS,
    generation: dict[str, Any] | None = None,
    chat_template: str | None = None,
    **config: Any,
) -> Iterator[Stack]:
    """`padding`: ids of the model beyond the tokenizer's; `generation`: of the base's generation config."""
    tokenizer = copy.deepcopy(tokenizer_of(kind)) if chat_template else tokenizer_of(kind)
    tokenizer.chat_template = chat_template or tokenizer.chat_template
    vocab_size = len(tokenizer) + padding
    base = tiny_model("llama", vocab_size=vocab_size, max_position_embeddings=positions)
    base.generation_config.update(**generation or {})
    packed = packed_backbone(base).model.to(dtype)
    backbone = DecoderOnly(packed, model_geometry(packed, "tiny"))
    with stack_of(base, backbone, tokenizer, root, **config) as stack:
        yield stack


@contextmanager
def stack_of(
    base: PreTrainedModel,
    backbone: Backbone,
    tokenizer: PreTrainedTokenizerFast,
    root: Path,
    *,
    decoder_start_id: int | None = None,
    **config: Any,
) -> Iterator[Stack]:
    """Run an engine and the services over a backbone of the base's weights."""
    store, metrics, outcomes = open_store(root), Metrics(), list[Outcome]()
    source = PromptCache(store, host_bytes=1 << 24)
    settings = EngineConfig(**{"max_rows": 16, "token_budget": 256, "kv_cache_bytes": 1 << 22} | config)
    eos_ids = frozenset({tokenizer.eos_token_id} - {None})
    grammars = Grammars(tokenizer, eos_ids=eos_ids, vocab_size=backbone.geometry.vocab_size)
    steps: list[StepStats] = []

    def on_step(step: StepStats) -> None:
        steps.append(step)
        metrics.on_step(step)

    engine = Engine(backbone, source, settings, grammars=grammars, on_step=on_step)

    def on_outcome(outcome: Outcome) -> None:
        outcomes.append(outcome)
        metrics.on_outcome(outcome)
        note_outcome(outcome)

    generation = GenerationService(
        engine,
        store,
        tokenizer,
        eos_ids=eos_ids,
        grammars=grammars,
        defaults=base_defaults(base.generation_config.to_dict(), max_rows=settings.max_rows),
        decoder_start_id=decoder_start_id,
        base_name=BASE_NAME,
        on_outcome=on_outcome,
        on_program=metrics.on_program,
    )
    metrics.watch(engine.stats, source.stats)
    engine.start()
    publishing = PublishingService(store, generation, on_stored=source.offer)
    try:
        yield Stack(
            base,
            tokenizer,
            root,
            store,
            source,
            engine,
            generation,
            publishing,
            metrics,
            outcomes,
            steps,
        )
    finally:
        engine.stop()
        generation.close()
        publishing.close()
        source.close()


def upload_of(
    prompt: bytes | None = None, config: bytes | None = None, task: Any = None, **more: Any
) -> Upload:
    files = {PROMPT: prompt, CONFIG: config}
    given = {name: data for name, data in files.items() if data is not None}
    return Upload(files=given, task=task, **more)


def run(work: Coroutine[Any, Any, _T]) -> _T:
    return asyncio.run(work)
