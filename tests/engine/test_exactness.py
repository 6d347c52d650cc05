"""The promise: a mixed, crowded, preempted batch gives what each request gives alone.

Per architecture 64 requests over 12 tasks go in at random times, some are cancelled, and blocks
are so scarce that preemption happens. Greedy tokens equal PEFT's at batch size 1 and every
step's log-probability is within 1e-4.
"""

import random
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from app.engine.engine import Engine, EngineConfig
from app.engine.sampling.token_masks import GrammarSource
from app.engine.statistics import StepStats
from app.errors import Cancelled
from app.models.decoder_only import DecoderOnly
from app.prompt import Prompt, VersionDraft
from app.request import Request
from app.store.cache.prompt_cache import PromptCache
from app.store.prompt_store import open_store
from benchmarks.completions import Completion, submit
from tests import oracle
from tests.oracle import Expected
from tests.tiny_models import ARCHITECTURES, VOCABULARY, packed_backbone, tiny_model

LOGPROB_TOLERANCE = 1e-4
NUM_REQUESTS = 64
NEW_TOKENS = 12


@dataclass(frozen=True)
class TinyTask:
    """A task and the model that is its oracle."""

    name: str
    model: Any
    prompt: Prompt | None = None
    resident_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class World:
    tasks: list[TinyTask]
    backbone: DecoderOnly
    source: PromptCache


def build_world(architecture: str, root: Path, **shape: object) -> World:
    base = tiny_model(architecture, **shape)
    configs = {f"soft-{p}": oracle.soft_config(p) for p in (1, 7, 20, 50)}
    configs["p-tuning"] = oracle.p_tuning_config(9)
    configs |= {f"prefix-{p}": oracle.prefix_config(p) for p in (1, 13, 30)}
    store = open_store(root / "store")
    tasks = [TinyTask("none", base), TinyTask("text", base, resident_ids=tuple(range(3, 40)))]
    tasks.append(TinyTask("short-text", base, resident_ids=(5, 6, 7)))
    for seed, (name, config) in enumerate(configs.items()):
        model = oracle.tuned(base, config, seed=seed)
        prompt = oracle.as_prompt(model, root / name)
        store.publish(name, VersionDraft(prompt=prompt))
        tasks.append(TinyTask(name, model, prompt))
    learned = tasks[-1]  # a template's leading text after a prefix
    tasks.append(replace(learned, name="prefix-and-text", resident_ids=(11, 12, 13, 14, 15)))
    assert len(tasks) == 12
    return World(tasks, packed_backbone(base), PromptCache(store, host_bytes=1 << 20))


def is_windowed(world: World) -> bool:
    """Whether all layers have a window."""
    return all(group.geometry.window for group in world.backbone.kv_groups)


@contextmanager
def crowded_engine(
    world: World,
    steps: list[StepStats],
    num_blocks: int = 62,
    max_rows: int = 12,
    speculate: int = 0,
    steps_in_flight: int | None = None,
    grammars: GrammarSource | None = None,
) -> Iterator[Engine]:
    """Few rows, a small budget, and blocks for hardly three requests."""
    block_size = 4
    if is_windowed(world):
        num_blocks //= 2  # each row holds less
    slot_bytes = sum(group.bytes_per_slot(world.backbone.dtype) for group in world.backbone.kv_groups)
    config = EngineConfig(
        max_rows=max_rows,
        token_budget=48,
        block_size=block_size,
        kv_cache_bytes=slot_bytes * block_size * num_blocks,
        speculate=speculate,
        steps_in_flight=steps_in_flight,
    )
    engine = Engine(world.backbone, world.source, config, grammars=grammars, on_step=steps.append)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()
        world.source.close()


def random_request(
    number: int, task: TinyTask, rng: random.Random, lengths: tuple[int, ...] = (1, 2, 5, 17, 40, 90)
) -> Request:
    return Request(
        id=f"{number}-{task.name}",
        token_ids=tuple(rng.randrange(VOCABULARY) for _ in range(rng.choice(lengths))),
        segments=oracle.segments(task.prompt, task.resident_ids),
        max_new_tokens=NEW_TOKENS,
        task=task.name,
    )


def expected_of(task: TinyTask, request: Request) -> Expected:
    return oracle.greedy(task.model, [*request.prompt_ids], request.max_new_tokens)


def difference(found: Completion, expected: Expected) -> str | None:
    """What is wrong with a completion, if anything."""
    if list(found.token_ids) != expected.tokens:
        return f"tokens {found.token_ids} instead of {expected.tokens}"
    worst = max(abs(a - b) for a, b in zip(found.logprobs, expected.logprobs, strict=True))
    return f"log-probability off by {worst:.1e}" if worst > LOGPROB_TOLERANCE else None


def submit_at_random_times(
    engine: Engine, requests: list[Request], rng: random.Random
) -> list[tuple[Request, "Future[Completion]"]]:
    """Submit all; some that nobody compares are cancelled at random moments."""
    submitted = []
    doomed: list[str] = []
    for request in requests:
        submitted.append((request, submit(engine, request)))
        if rng.random() < 0.25:
            stranger = replace(request, id=f"{request.id}-doomed", max_new_tokens=100)
            submitted.append((stranger, submit(engine, stranger)))
            doomed.append(stranger.id)
        if doomed and rng.random() < 0.5:
            engine.cancel(doomed.pop(0))
        time.sleep(rng.choice([0, 0, 0.002, 0.005]))
    for request_id in doomed:
        engine.cancel(request_id)
    return submitted


@pytest.mark.parametrize(
    ("architecture", "in_flight"),
    [*((each, 1) for each in ARCHITECTURES), ("llama", 2), ("gemma2", 2), ("mistral", 2)],
)
def test_a_crowded_mixed_batch_equals_each_request_alone(
    architecture: str, in_flight: int, tmp_path: Path
) -> None:
    rng = random.Random(architecture)
    world = build_world(architecture, tmp_path)
    tasks = [world.tasks[i % len(world.tasks)] for i in range(NUM_REQUESTS)]
    rng.shuffle(tasks)
    requests = [random_request(number, task, rng) for number, task in enumerate(tasks)]
    if is_windowed(world):  # only short rows grow, so they have to grow more
        requests = [replace(request, max_new_tokens=3 * NEW_TOKENS) for request in requests]
    steps: list[StepStats] = []
    with crowded_engine(world, steps, steps_in_flight=in_flight) as engine:
        submitted = submit_at_random_times(engine, requests, rng)
        futures = {request.id: future for request, future in submitted}
        found = [futures[request.id].result(timeout=120) for request in requests]
        cancelled = [future.exception(timeout=120) for key, future in futures.items() if "doomed" in key]
    wrong = {}
    seen: set[tuple[int, ...]] = set()
    for task, request, completion in zip(tasks, requests, found, strict=True):
        expected = expected_of(task, request)
        seen.add(tuple(expected.tokens))
        problem = difference(completion, expected)
        if problem:
            wrong[request.id] = problem
    assert not wrong
    assert len(seen) > NUM_REQUESTS * 3 / 4, "outputs must vary, or the comparison proves little"
    assert sum(step.num_preempted for step in steps), "blocks were scarce enough to preempt"
    assert max(step.num_distinct_tasks for step in steps) >= 3, "tasks were mixed within a step"
    assert any(isinstance(error, Cancelled) for error in cancelled), "some requests were cancelled"


@pytest.mark.parametrize("architecture", ["gemma2", "gpt_oss"])
def test_rows_far_longer_than_the_window_equal_each_request_alone(architecture: str, tmp_path: Path) -> None:
    """Window groups hold a part of these rows and prefixes, and what they give back others write to."""
    rng = random.Random(architecture)
    world = build_world(architecture, tmp_path, num_hidden_layers=4)
    tasks = world.tasks * 2
    rng.shuffle(tasks)
    requests = [random_request(number, task, rng, (20, 90, 200)) for number, task in enumerate(tasks)]
    requests = [replace(request, max_new_tokens=60) for request in requests]
    steps: list[StepStats] = []
    with crowded_engine(world, steps, num_blocks=110) as engine:
        futures = [submit(engine, request) for request in requests]
        found = [future.result(timeout=120) for future in futures]
    answers = zip(tasks, requests, found, strict=True)
    problems = [difference(completion, expected_of(task, request)) for task, request, completion in answers]
    assert set(problems) == {None}
    assert sum(step.num_preempted for step in steps), "blocks were scarce enough to preempt"


def test_swapping_two_prompts_is_noticed(tmp_path: Path) -> None:
    """The comparison has teeth: with two prompts of equal length exchanged, every request differs."""
    base = tiny_model("llama")
    models = [oracle.tuned(base, oracle.soft_config(8), seed=seed) for seed in (1, 2)]
    prompts = [oracle.as_prompt(model, tmp_path / str(i)) for i, model in enumerate(models)]
    store = open_store(tmp_path / "store")
    for name, prompt in zip("ab", prompts, strict=True):
        store.publish(name, VersionDraft(prompt=prompt))
    tasks = [TinyTask("a", models[0], prompts[0]), TinyTask("b", models[1], prompts[1])]
    swapped = [replace(task, prompt=other.prompt) for task, other in zip(tasks, tasks[::-1], strict=True)]
    world = World(tasks, packed_backbone(base), PromptCache(store, host_bytes=1 << 20))
    rng = random.Random(5)
    with crowded_engine(world, []) as engine:
        for right, wrong in zip(tasks, swapped, strict=True):
            for number in range(4):
                request = random_request(number, right, rng)
                expected = expected_of(right, request)
                assert difference(submit(engine, request).result(60), expected) is None
                stray = replace(request, segments=oracle.segments(wrong.prompt))
                assert difference(submit(engine, stray).result(60), expected) is not None


def test_a_cartridge_equals_peft(tmp_path: Path) -> None:
    base = tiny_model("llama")
    model = oracle.tuned(base, oracle.cartridge_config(24), seed=3)
    task = TinyTask("cartridge", model, oracle.as_prompt(model, tmp_path / "cartridge"))
    store = open_store(tmp_path / "store")
    store.publish("cartridge", VersionDraft(prompt=task.prompt))
    world = World([task], packed_backbone(base), PromptCache(store, host_bytes=1 << 20))
    request = random_request(0, task, random.Random(1))
    with crowded_engine(world, []) as engine:
        assert difference(submit(engine, request).result(60), expected_of(task, request)) is None
