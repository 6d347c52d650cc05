"""A Plan is plain data: it runs in another process, on the same weights, with equal tokens."""

import io
import pickle
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from app.engine.blocks import KVBlocks
from app.engine.memory.kv_memory import kv_blocks
from app.engine.plan import Plan, StepResult
from app.engine.prefixes import prefix_keys
from app.engine.runner import Runner
from app.engine.scheduler import Scheduler, SchedulerConfig
from app.engine.sequence import Phase, Sequence
from app.models.attention.kv_cache import KVCache
from app.models.backbone import Backbone
from app.prompt import ModelGeometry, Prompt, PromptKind, TaskType
from app.request import Request, SamplingParams, TokenRules
from app.sites import Embedding, Site
from app.store.prompt_file import make_prompt
from tests import oracle
from tests.engine.seq2seq import Task, prefix_task
from tests.processes import FORKS
from tests.store.builders import raw
from tests.tiny_models import packed_backbone, packed_seq2seq, tiny_model, tiny_seq2seq

BLOCK_SIZE, MAX_ROWS, TOKEN_BUDGET = 4, 8, 40
PLAIN = {"app.prompt", "app.request", "app.sites", "app.engine.plan", "app.engine.sampling.inputs"}
PLAIN |= {"app.models.attention.backend", "app.models.attention.metadata", "numpy", "builtins"}


def runner(architecture: str) -> tuple[Runner, KVBlocks, ModelGeometry]:
    """Return a runner on weights that are the same in every process, and what a scheduler needs of it."""
    torch.set_num_threads(1)
    backbone: Backbone  # gemma2 has two KV groups, one of them with a window
    if architecture == "bart":
        backbone = packed_seq2seq(tiny_seq2seq("bart"))
    else:
        backbone = packed_backbone(tiny_model(architecture))
    blocks = kv_blocks(
        backbone, block_size=BLOCK_SIZE, kv_cache_bytes=1 << 18, max_rows=MAX_ROWS, token_budget=TOKEN_BUDGET
    )
    slots = [(1 + count) * BLOCK_SIZE for count in blocks.capacity.tolist()]
    pools = [group.pool for group in blocks.groups]
    cache = KVCache(backbone.kv_groups, slots, dtype=backbone.dtype, device=backbone.device, pools=pools)
    return Runner(backbone, cache), blocks, backbone.geometry


def serve(pipe: Connection) -> None:
    """The other process: plans in, results out."""
    runners = {}
    while True:
        data = pipe.recv_bytes()
        if not data:
            return
        architecture, plan = pickle.loads(data)
        if architecture not in runners:
            runners[architecture], _, _ = runner(architecture)
        pipe.send(runners[architecture].run(plan, dict).result())


@pytest.fixture(scope="module")
def other_process() -> Iterator[Connection]:
    pipe, theirs = FORKS.Pipe()
    process = FORKS.Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    yield pipe
    pipe.send_bytes(b"")
    process.join(60)


class Names(pickle.Unpickler):
    """Notes the modules that a pickled Plan names."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(io.BytesIO(pickle.dumps(plan)))
        self.modules: set[str] = set()
        self.load()

    def find_class(self, module: str, name: str) -> Any:
        self.modules.add(module)
        return super().find_class(module, name)


def causal_requests(soft: Prompt, prefix: Prompt) -> list[tuple[Request, Prompt | None]]:
    """Soft prompts, prefixes and text; greedy, drawn, with penalties, rules and scores; in chunks."""
    rules = TokenRules(no_repeat_ngram_size=2, min_new_tokens=4, stop_ids=(3,))
    sampled = SamplingParams(do_sample=True, temperature=1.3, top_k=30, seed=7)
    looks_back = SamplingParams(do_sample=True, seed=2, repetition_penalty=1.4, rules=rules)
    kinds: list[tuple[Prompt | None, dict[str, Any]]] = [
        (None, {"token_ids": tuple(range(1, 60)), "num_top": 3}),
        (soft, {"sampling": sampled, "segments": oracle.segments(soft, (4, 4, 9))}),
        (soft, {"sampling": looks_back, "segments": oracle.segments(soft, (4, 4, 9))}),
        (prefix, {"token_ids": (7, 8, 9, 10), "num_scored": 3, "num_top": 2}),
        (prefix, {"sampling": SamplingParams(logit_bias=((5, 3.0), (6, -100.0)))}),
    ]
    return [
        (
            Request(
                id=str(number),
                **{"segments": oracle.segments(prompt), "token_ids": (5, 6, 7), "max_new_tokens": 6}
                | settings,
            ),
            prompt,
        )
        for number, (prompt, settings) in enumerate(kinds)
    ]


def same(one: StepResult, other: StepResult) -> bool:
    return pickle.dumps(one) == pickle.dumps(other)


def run_in_both(
    other: Connection, architecture: str, requests: list[tuple[Request, Prompt | None]]
) -> list[Plan]:
    """Run requests to their ends, each plan in both processes; return the plans."""
    here, blocks, geometry = runner(architecture)
    scheduler = Scheduler(blocks, SchedulerConfig(max_rows=MAX_ROWS, token_budget=TOKEN_BUDGET))
    sequences = []
    for request, prompt in requests:
        sequence = Sequence(request, prefix_keys(request, geometry))
        scheduler.add(sequence)
        sequences.append(sequence)
        for parked in scheduler.take_loads():
            assert prompt is not None
            scheduler.loaded(parked, prompt)
    plans: list[Plan] = []
    while any(sequence.phase is not Phase.FINISHED for sequence in sequences):
        step = scheduler.schedule()
        plans.append(step.plan())
        other.send_bytes(pickle.dumps((architecture, plans[-1])))
        result = here.run(plans[-1], dict).result()
        assert same(other.recv(), result)
        scheduler.update(step, result, 0.0)
    assert all(sequence.num_generated for sequence in sequences)
    named = set().union(*(Names(plan).modules for plan in plans))
    assert {name for name in named if not name.startswith("numpy.")} <= PLAIN
    return plans


def test_a_plan_runs_in_another_process_with_equal_tokens(other_process: Connection, tmp_path: Path) -> None:
    base = tiny_model("gemma2")
    soft = oracle.as_prompt(oracle.tuned(base, oracle.soft_config(6), seed=1), tmp_path / "soft")
    prefix = oracle.as_prompt(oracle.tuned(base, oracle.prefix_config(9), seed=2), tmp_path / "prefix")
    plans = run_in_both(other_process, "gemma2", causal_requests(soft, prefix))
    items = [item for plan in plans for item in plan.items]
    assert any(plan.writes for plan in plans), "a prefix was written"
    assert any(item.soft_prompt is not None for item in items), "a soft prompt was embedded"
    assert any(item.kv.num_computed and item.kv.num_tokens > 1 for item in items), "a prompt came in chunks"
    assert any(row.edits for item in items for row in item.sampling)


def test_a_plan_with_sources_does_too(other_process: Connection) -> None:
    base = tiny_seq2seq("bart")
    prefix = prefix_task("three-site", base, dict(zip(Site, (7, 3, 4), strict=True)))
    rows = make_prompt(
        PromptKind.SOFT, {Embedding.ENCODER: raw((5, 48), seed=1)}, task_type=TaskType.SEQ_2_SEQ_LM
    )
    tasks = (Task("none"), prefix, Task("soft", rows))
    requests = [
        (task.request(f"{task.name} {length}", tuple(range(3, 3 + length)), max_new_tokens=6), task.prompt)
        for task in tasks
        for length in (4, 60)
    ]
    plans = run_in_both(other_process, "bart", requests)
    sources = [source for plan in plans for source in plan.sources]
    assert len(sources) == len(requests)
    assert any(source.soft_prompt is not None for source in sources)
    assert any(source.kv.prefix_slots for source in sources)
    assert [len(write.slots) for plan in plans for write in plan.writes] == [3]
