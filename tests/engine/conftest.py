"""A tiny llama behind an engine, shared by the tests of this folder."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import PreTrainedModel

from app.engine.engine import Engine, EngineConfig
from app.engine.sequence import Sequence
from app.engine.statistics import StepStats
from app.engine.step import Step
from app.models.decoder_only import DecoderOnly
from app.prompt import Prompt, VersionDraft
from app.request import Request
from app.store.cache.prompt_cache import PromptCache
from app.store.prompt_store import PromptStore, open_store
from tests import oracle
from tests.tiny_models import packed_backbone, tiny_model


@dataclass
class Bench:
    """A base, its oracle, a store, and a running engine."""

    base: PreTrainedModel
    backbone: DecoderOnly
    store: PromptStore
    source: PromptCache
    engine: Engine
    steps: list[StepStats] = field(default_factory=list)

    def request(
        self, name: str, prompt: Prompt | None = None, text: tuple[int, ...] = (), **settings: object
    ) -> Request:
        defaults: dict[str, object] = {"token_ids": (5, 6, 7), "max_new_tokens": 8, "task": name}
        defaults["segments"] = oracle.segments(prompt, text)
        return Request(id=name, **defaults | settings)


def often_preempted(engine: Engine) -> list[Sequence]:
    """Let an engine preempt its youngest row before every fourth step; return those that it has preempted."""
    scheduler, preempted = engine._scheduler, list[Sequence]()
    schedule, numbers = scheduler.schedule, itertools.count(1)

    def preempt_and_schedule() -> Step:
        if next(numbers) % 4 == 0 and scheduler.running:
            preempted.append(scheduler.running[-1])
            scheduler._preempt(preempted[-1], Step(0))
        return schedule()

    scheduler.schedule = preempt_and_schedule  # type: ignore[method-assign]
    return preempted


@pytest.fixture(params=[1, 2], ids=["one in flight", "two in flight"])
def steps_in_flight(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many steps the test's engines have at once: as on a CPU, and as on a GPU."""
    count: int = request.param
    monkeypatch.setattr("app.engine.engine.steps_in_flight_on", lambda device: count)
    return count


@pytest.fixture(scope="session")
def tiny_llama() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="session")
def llama_backbone(tiny_llama: PreTrainedModel) -> DecoderOnly:
    return packed_backbone(tiny_llama)


@pytest.fixture
def bench(tiny_llama: PreTrainedModel, llama_backbone: DecoderOnly, tmp_path: Path) -> Iterator[Bench]:
    store = open_store(tmp_path / "store")
    source = PromptCache(store, host_bytes=1 << 20)
    steps: list[StepStats] = []
    config = EngineConfig(max_rows=48, token_budget=256, kv_cache_bytes=8 << 20)
    engine = Engine(llama_backbone, source, config, on_step=steps.append)
    engine.start()
    yield Bench(tiny_llama, llama_backbone, store, source, engine, steps)
    engine.stop()
    source.close()


@pytest.fixture
def soft_model(bench: Bench) -> PeftModel:
    return oracle.tuned(bench.base, oracle.soft_config(6), seed=1)


@pytest.fixture
def soft_prompt(bench: Bench, soft_model: PeftModel, tmp_path: Path) -> Prompt:
    prompt = oracle.as_prompt(soft_model, tmp_path / "soft")
    bench.store.publish("soft", VersionDraft(prompt=prompt))
    return prompt
