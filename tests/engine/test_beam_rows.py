"""Beams in a crowded, preempted batch: all answers and scores are those of `generate` alone.

Greedy rows run beside them. A block that is lost, or held by other numbers than the tables', ends the engine
as soon as it is idle.
"""

import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from app.engine.statistics import StepStats
from app.errors import Cancelled, ConstraintFailed, DeadlineExceeded, InvalidRequest, NonFiniteLogits
from app.prompt import VersionDraft
from app.request import Request, SamplingParams, Segment, TokenRules
from app.store.cache.prompt_cache import PromptCache
from app.store.prompt_store import open_store
from benchmarks.completions import submit
from tests import beam_oracle, oracle
from tests.engine.conftest import Bench, often_preempted
from tests.engine.test_engine import overflowing_prompt
from tests.engine.test_exactness import TinyTask, World, crowded_engine, difference, expected_of
from tests.tiny_models import VOCABULARY, packed_backbone, tiny_model
from tests.waiting import wait_until

NEW = 18
NUM_SEARCHES = 12


def small_world(architecture: str, root: Path) -> World:
    """The base alone, a soft prompt, a prefix, and leading text after one."""
    base = tiny_model(architecture)
    store = open_store(root / "store")
    tasks = [TinyTask("none", base), TinyTask("text", base, resident_ids=tuple(range(3, 24)))]
    for seed, (name, config) in enumerate(
        {"soft": oracle.soft_config(7), "prefix": oracle.prefix_config(13)}.items()
    ):
        model = oracle.tuned(base, config, seed=seed)
        prompt = oracle.as_prompt(model, root / name)
        store.publish(name, VersionDraft(prompt=prompt))
        tasks.append(TinyTask(name, model, prompt))
    tasks.append(replace(tasks[-1], name="prefix-and-text", resident_ids=(11, 12, 13, 14, 15)))
    return World(tasks, packed_backbone(base), PromptCache(store, host_bytes=1 << 20))


def random_search(number: int, task: TinyTask, rng: random.Random) -> tuple[Request, dict[str, Any]]:
    """A request, and what `generate` calls its rules."""
    settings: dict[str, Any] = rng.choice(
        [{}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 6}, {"no_repeat_ngram_size": 1}]
    )
    stop_ids = frozenset(rng.sample(range(VOCABULARY), rng.choice((0, 1, 12))))
    rules = TokenRules(stop_ids=tuple(stop_ids), max_new_tokens=NEW, **settings)
    ids = tuple(rng.randrange(VOCABULARY) for _ in range(rng.choice((1, 2, 5, 13, 20))))
    shared = rng.choice((0, len(ids) - 1))  # as serving has it: what all rows share is a segment
    text = (Segment(token_ids=ids[:shared], is_kept=False),) if shared else ()
    request = Request(
        id=f"search-{number}-{task.name}",
        token_ids=ids[shared:],
        segments=oracle.segments(task.prompt, task.resident_ids) + text,
        max_new_tokens=NEW,
        task=task.name,
        stop_ids=stop_ids,
        sampling=SamplingParams(
            num_beams=rng.choice((2, 3, 4, 5, 5)),
            length_penalty=rng.choice((-0.5, 0.0, 1.0, 2.0)),
            early_stopping=rng.choice((True, False, "never")),
            rules=rules,
        ),
    )
    return request, settings


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_all_answers_and_scores_are_those_of_generate(architecture: str, tmp_path: Path) -> None:
    world = small_world(architecture, tmp_path)
    rng = random.Random(architecture)
    steps: list[StepStats] = []
    searches = [random_search(n, world.tasks[n % len(world.tasks)], rng) for n in range(NUM_SEARCHES)]
    greedy = [
        Request(
            id=f"greedy-{n}",
            token_ids=tuple(rng.randrange(VOCABULARY) for _ in range(9)),
            segments=oracle.segments(task.prompt, task.resident_ids),
            max_new_tokens=NEW,
            task=task.name,
        )
        for n, task in enumerate(world.tasks)
    ]
    models = {task.name: task for task in world.tasks}
    with crowded_engine(world, steps, num_blocks=57, max_rows=24) as engine:
        preempted = often_preempted(engine)
        requests = [request for request, _ in searches] + greedy
        rng.shuffle(requests)
        futures = {request.id: submit(engine, request) for request in requests}
        found = {id_: future.result(120) for id_, future in futures.items()}
        wait_until(lambda: engine.stats().num_running == 0)
        assert engine.is_alive
    for request, settings in searches:
        wanted = beam_oracle.searched(models[request.task].model, request, **settings)
        beam_oracle.check(found[request.id].hypotheses, wanted)
    for request in greedy:
        assert difference(found[request.id], expected_of(models[request.task], request)) is None
    assert any(row.beams is not None and row.num_generated for row in preempted), "in mid-search"
    assert max(step.num_running for step in steps) <= 24


def search(bench: Bench, name: str, **settings: Any) -> Request:
    sampling = SamplingParams(num_beams=4, **settings.pop("sampling", {}))
    return bench.request(name, sampling=sampling, **{"max_new_tokens": 200} | settings)


def is_under_way(bench: Bench) -> bool:
    return any(step.num_running == 4 for step in bench.steps)


def check_nothing_is_lost(bench: Bench) -> None:
    """An engine that comes to rest has proved that its blocks add up."""
    request = search(bench, "last", max_new_tokens=5)
    found = submit(bench.engine, request).result(60)
    beam_oracle.check(found.hypotheses, beam_oracle.searched(bench.base, request))
    wait_until(lambda: bench.engine.stats().kv_usage == 0)
    assert bench.engine.is_alive


def test_a_cancelled_search_leaves_nothing_behind(bench: Bench) -> None:
    future = submit(bench.engine, search(bench, "r"))
    wait_until(lambda: is_under_way(bench))
    bench.engine.cancel("r")
    with pytest.raises(Cancelled):
        future.result(60)
    check_nothing_is_lost(bench)


def test_a_late_search_leaves_nothing_behind(bench: Bench) -> None:
    request = search(bench, "r", deadline=time.monotonic() + 0.3, max_new_tokens=300)
    with pytest.raises(DeadlineExceeded):
        submit(bench.engine, request).result(60)
    check_nothing_is_lost(bench)


def test_a_search_with_nan_fails_alone(bench: Bench, tmp_path: Path) -> None:
    bad = overflowing_prompt(bench, tmp_path / "overflow")
    beside = submit(bench.engine, bench.request("beside", max_new_tokens=20))
    poisoned = replace(search(bench, "bad"), segments=oracle.segments(bad))
    with pytest.raises(NonFiniteLogits):
        submit(bench.engine, poisoned).result(60)
    assert list(beside.result(60).token_ids) == oracle.greedy(bench.base, [5, 6, 7], 20).tokens
    wait_until(lambda: bench.engine.stats().num_running == 0)
    assert bench.engine.is_alive


def test_a_search_in_which_nothing_may_come_fails(bench: Bench) -> None:
    rules = TokenRules(suppressed=tuple(range(VOCABULARY)))
    with pytest.raises(ConstraintFailed):
        submit(bench.engine, search(bench, "r", sampling={"rules": rules})).result(60)
    check_nothing_is_lost(bench)


def test_fewer_beams_than_wanted_go_on_where_few_tokens_may_come(bench: Bench) -> None:
    """From one beam after a forced token to four, and to fewer again, when all has been said."""
    few = tuple(id_ for id_ in range(VOCABULARY) if id_ not in (3, 4, 5))
    rules = TokenRules(suppressed=few, no_repeat_ngram_size=1, forced_first=3, max_new_tokens=3)
    request = search(bench, "r", token_ids=(9,), max_new_tokens=3, sampling={"rules": rules})
    found = submit(bench.engine, request).result(60).hypotheses
    assert sorted([token.token_id for token in each.tokens] for each in found) == [[3, 4, 5], [3, 5, 4]]
    check_nothing_is_lost(bench)


def test_prompt_scores_and_top_tokens_come_with_beams(bench: Bench) -> None:
    request = search(bench, "r", max_new_tokens=4, num_scored=2, num_top=3)
    (best, *_) = submit(bench.engine, request).result(60).hypotheses
    ids = [5, 6, 7, *(token.token_id for token in best.tokens)]
    logprobs = bench.base(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    for place, token in enumerate(best.tokens):
        values, top = logprobs[2 + place].topk(3)
        assert [id_ for id_, _ in token.top] == top.tolist()
        assert [logprob for _, logprob in token.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_what_can_never_run_is_refused(bench: Bench) -> None:
    many = bench.request("r", sampling=SamplingParams(num_beams=49))
    with pytest.raises(InvalidRequest, match="48 rows"):
        bench.engine.check_admissible(many)
