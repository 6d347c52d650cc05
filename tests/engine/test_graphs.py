"""Decode steps by graphs choose the tokens that eager steps choose.

On a CPU a graph is a function that is called again, on the same fixed memory and row counts as on a GPU. All
slots are NaN at first.
"""

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from app.engine.engine import Engine
from app.engine.graphs.capture import Repetition
from app.engine.graphs.decode_graphs import Bucket, bucket_sizes
from app.engine.plan import Plan, PlanItem
from app.engine.runner import LateInputs, Launched
from app.models.attention import kv_cache, triton
from app.models.attention.cascade import ALWAYS
from app.request import Request, SamplingParams
from benchmarks.completions import Completion, submit, submit_all
from tests.engine import seq2seq
from tests.engine.padded_backend import use_padded_backends
from tests.engine.test_encoder_decoder import engine_of, ids, nan_pool, wrong
from tests.engine.test_exactness import (
    build_world,
    crowded_engine,
    difference,
    expected_of,
    random_request,
    submit_at_random_times,
)
from tests.tiny_models import ARCHITECTURES
from tests.waiting import PATIENCE

OTHERS = [
    pytest.param(name, marks=pytest.mark.soak) for name in ARCHITECTURES if name not in {"llama", "gemma2"}
]
MOST = 6  # rows of the largest graph; engines have more


@dataclass
class Counts:
    """What ran by graphs, and a gate before every step."""

    replays: dict[int, int]  # by row count
    choices: int = 0  # within a graph
    followed: int = 0  # tokens that never were on the host
    gate: threading.Event = field(default_factory=threading.Event)


@contextmanager
def graphs_of(engine: Engine) -> Iterator[Counts]:
    """Record an engine's decode steps, and let rows follow the step before wherever they can."""
    runner, lines = engine._executor._runner, list[str]()
    runner.record_graphs(max_rows=MOST, capture=Repetition(), progress=lines.append)
    graphs = runner._graphs
    assert graphs is not None, lines
    assert graphs.sizes == [1, 2, 4, 6]
    counts = Counts(dict.fromkeys(graphs.sizes, 0))

    def counted(bucket: Bucket) -> Bucket:
        def forward() -> None:
            counts.replays[bucket.num_rows] += 1
            bucket.forward()

        def choose() -> None:
            counts.choices += 1
            bucket.choose()

        return Bucket(bucket.num_rows, forward, choose)

    graphs._buckets[:] = map(counted, graphs._buckets)
    counts.gate.set()
    run = runner.run

    def run_following(plan: Plan, late: LateInputs) -> Launched:
        assert counts.gate.wait(PATIENCE)
        before = {} if runner._chosen is None else runner._chosen.rows()
        items = [following(item) if item.id in before else item for item in plan.items]
        counts.followed += sum(item.follows for item in items)
        return run(replace(plan, items=tuple(items)), late)

    runner.run = run_following  # type: ignore[method-assign]
    yield counts


def together(engine: Engine, counts: Counts, requests: list[Request]) -> list[Completion]:
    """Answers to requests of which none is a step ahead, however busy the machine is."""
    counts.gate.clear()
    try:
        futures = submit_all(engine, requests)
    finally:
        counts.gate.set()
    return [future.result(PATIENCE) for future in futures]


def following(item: PlanItem) -> PlanItem:
    """Return a row's item without its token."""
    return item._replace(token_ids=(), follows=True) if item.kv.num_tokens == 1 else item


def test_row_counts_are_few_and_near() -> None:
    assert bucket_sizes(1) == [1]
    assert bucket_sizes(3) == [1, 2, 3]
    assert bucket_sizes(64) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]
    assert bucket_sizes(100) == [*bucket_sizes(64), 80, 96, 100]
    assert bucket_sizes(256) == [*bucket_sizes(64), 80, 96, 112, 128, 160, 192, 224, 256]
    for most in range(1, 1000):
        sizes = bucket_sizes(most)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == most
        assert all(b - a <= max(8, a / 4) for a, b in pairwise(sizes))


@pytest.mark.parametrize("architecture", ["llama", "gemma2", *OTHERS])
def test_a_mixed_batch_equals_each_request_alone(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows come and go, over prefixes and windows; some steps are larger than any graph, some have chunks."""
    monkeypatch.setattr(kv_cache, "_pool", nan_pool)
    rng = random.Random(architecture)
    world = build_world(architecture, tmp_path)
    use_padded_backends(world.backbone)
    tasks = rng.sample(world.tasks * 2, 20)
    requests = [random_request(number, task, rng, (1, 5, 17, 40)) for number, task in enumerate(tasks)]
    plain_tasks = [task for task in world.tasks * 2 if task.prompt is None][:5]
    plain = [random_request(100 + n, task, rng, (1, 5, 17)) for n, task in enumerate(plain_tasks)]
    with crowded_engine(world, [], num_blocks=120) as engine, graphs_of(engine) as counts:
        futures = {each.id: future for each, future in submit_at_random_times(engine, requests, rng)}
        found = [futures[request.id].result(timeout=120) for request in requests]
        for count in (1, 2, 3, 5):  # no prompt of theirs is to be loaded: they decode together
            tasks += plain_tasks[:count]
            rows = [replace(request, id=f"{request.id}-{count}") for request in plain[:count]]
            found += together(engine, counts, rows)
            requests += rows
    expected = [expected_of(task, request) for task, request in zip(tasks, requests, strict=True)]
    assert [difference(*each) for each in zip(found, expected, strict=True)] == [None] * len(found)
    assert min(counts.replays.values()) > 2, "every row count occurred"
    assert counts.choices == sum(counts.replays.values()), "all were greedy"
    assert counts.followed > 50


def tokens(answers: Any) -> list[tuple[int, ...]]:
    return [answer.token_ids for answer in answers]


def test_rows_of_all_kinds_get_what_they_get_without_graphs(tmp_path: Path) -> None:
    """Greedy, drawn, penalised and reporting rows; with graphs, two steps are in flight."""
    rng = random.Random(4)
    world = build_world("llama", tmp_path)
    drawn = SamplingParams(do_sample=True, temperature=1.3, top_k=30)
    kinds: list[dict[str, Any]] = [
        {},
        {"sampling": replace(drawn, seed=1)},
        {"sampling": replace(drawn, seed=2, repetition_penalty=1.4)},
        {"sampling": SamplingParams(repetition_penalty=3.0)},
        {"num_top": 3},
        {"sampling": SamplingParams(logit_bias=((5, 3.0), (6, -100.0)))},
    ]
    requests = [
        replace(random_request(number, task, rng, (1, 5, 17)), **kinds[number % len(kinds)])
        for number, task in enumerate(world.tasks)
    ]
    lone = [replace(requests[number], id=f"{number}") for number in (0, 3)]
    with crowded_engine(world, [], num_blocks=120, max_rows=5) as engine:
        expected = answers(engine, requests, lone)
    use_padded_backends(world.backbone)
    with (
        crowded_engine(world, [], num_blocks=120, max_rows=5, steps_in_flight=2) as engine,
        graphs_of(engine) as counts,
    ):
        assert answers(engine, requests, lone) == expected
    assert 0 < counts.choices < sum(counts.replays.values())
    assert counts.followed > 50


def answers(engine: Engine, together: list[Request], lone: list[Request]) -> list[tuple[int, ...]]:
    found = [each.result(120) for each in submit_all(engine, together)]
    return tokens([*found, *(submit(engine, request).result(120) for request in lone)])


@pytest.mark.parametrize("architecture", ["t5-gated", "bart"])
def test_rows_of_encoder_decoders_equal_each_request_alone(architecture: str, tmp_path: Path) -> None:
    world = seq2seq.build_world(architecture, tmp_path)
    use_padded_backends(world.backbone)
    rng = random.Random(7)
    # No prompt of the first ones is to be loaded: they decode together.
    tasks = [*[world.task("none")] * 5, *world.tasks]
    requests = [task.request(f"{n}", ids(rng, rng.choice((2, 9, 20)))) for n, task in enumerate(tasks)]
    expected = [world.expected(task, request) for task, request in zip(tasks, requests, strict=True)]
    asked = list(zip(requests, expected, strict=True))
    with engine_of(world, max_rows=8) as engine, graphs_of(engine) as counts:
        assert not wrong([each.result(120) for each in submit_all(engine, requests)], asked)
        for count in (1, 2, 3, 5):
            again = [(replace(each, id=f"{each.id}-{count}"), right) for each, right in asked[:count]]
            assert not wrong(together(engine, counts, [each for each, _ in again]), again)
    world.source.close()
    assert min(counts.replays.values()) > 2


def test_graphs_over_tritons_kernels_equal_each_request_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contexts are split, prefixes shared, windows passed, and larger steps leave items behind."""
    monkeypatch.setattr(kv_cache, "_pool", nan_pool)
    monkeypatch.setattr(triton, "_num_processors", lambda device: 1)  # a graph has fewer items then
    world = build_world("gemma2", tmp_path, num_hidden_layers=2)
    backbone = world.backbone
    backbone.backends = [
        triton.TritonBackend(group.geometry, backbone.dtype, backbone.device, ALWAYS)
        for group in backbone.kv_groups
    ]
    rng = random.Random(2)
    named = {task.name: task for task in world.tasks}
    tasks = [named[name] for name in ("prefix-30", "prefix-30", "text", "soft-7", "none")]
    requests = [random_request(number, task, rng, (2, 5)) for number, task in enumerate(tasks)]
    requests = [replace(request, max_new_tokens=4) for request in requests]
    expected = [expected_of(task, request) for task, request in zip(tasks, requests, strict=True)]
    with crowded_engine(world, [], num_blocks=120) as engine, graphs_of(engine) as counts:
        for number, count in enumerate((5, 5, 3, 2, 1)):  # after the first time, prefixes are resident
            rows = [replace(request, id=f"{request.id}-{number}") for request in requests[:count]]
            found = together(engine, counts, rows)
            assert [difference(*each) for each in zip(found, expected, strict=False)] == [None] * count
    assert min(counts.replays.values()) > 0
    assert counts.followed > 8
