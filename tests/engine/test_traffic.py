"""Traffic of all kinds at random times: with two steps in flight, each request gets what it gets with one."""

import random
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from app.engine.plan import PlanItem
from app.engine.step import Step
from app.errors import Cancelled
from app.request import Request, SamplingParams, TokenRules
from benchmarks.completions import Completion, submit
from tests.engine.conftest import often_preempted
from tests.engine.sampling.test_token_masks import END, StepGrammars, random_steps, written
from tests.engine.test_exactness import (
    TinyTask,
    World,
    build_world,
    crowded_engine,
    difference,
    expected_of,
    random_request,
    submit_at_random_times,
)

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"sampling": SamplingParams(do_sample=True, temperature=1.3, seed=7)},
    "filtered": {"sampling": SamplingParams(do_sample=True, top_k=20, top_p=0.9, seed=8), "num_top": 2},
    "penalised": {
        "sampling": SamplingParams(
            do_sample=True, seed=9, repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.2
        )
    },
    "ruled": {
        "sampling": SamplingParams(
            rules=TokenRules(no_repeat_ngram_size=2, min_new_tokens=6, stop_ids=(3, 4), suppressed_first=(9,))
        ),
        "stop_ids": frozenset({3, 4}),
    },
    "biased": {"sampling": SamplingParams(logit_bias=((5, 3.0), (6, -100.0)))},
    "constrained": {"grammar": written(random_steps(1, 8, 5)), "stop_ids": frozenset({END})},
    "constrained and penalised": {
        "grammar": written(random_steps(2, 30, 6)),
        "sampling": SamplingParams(do_sample=True, seed=3, repetition_penalty=1.5),
    },
    "searched": {"sampling": SamplingParams(num_beams=3)},
    "scored": {"num_scored": 3, "num_top": 1},
    "only scored": {"num_scored": 2, "max_new_tokens": 0},
    "stopping": {"stop_ids": frozenset(range(0, 200, 5))},
    "single": {"max_new_tokens": 1},
}


def random_traffic(world: World, rng: random.Random, count: int) -> list[tuple[str, TinyTask, Request]]:
    traffic = []
    for number in range(count):
        kind, task = rng.choice([*KINDS, "greedy"]), rng.choice(world.tasks)
        request = random_request(number, task, rng, (4, 5, 17, 40))
        if kind == "searched":
            request = replace(request, token_ids=request.token_ids[:5], max_new_tokens=5)
        traffic.append((kind, task, replace(request, **KINDS[kind])))
    return traffic


def answers(world: World, traffic: list[Request], seed: int, in_flight: int) -> tuple[list[Completion], int]:
    """Send it all, beside strangers that are cancelled; return what came, and how many tokens went ahead."""
    rng, grammars = random.Random(seed), StepGrammars()
    with crowded_engine(world, [], num_blocks=100, steps_in_flight=in_flight, grammars=grammars) as engine:
        preempted, items = often_preempted(engine), planned_items(engine._scheduler)
        submitted = dict[str, Future[Completion]]()
        for request, future in submit_at_random_times(engine, traffic, rng):
            submitted[request.id] = future
        found = [submitted[request.id].result(120) for request in traffic]
        found += [said for number in range(3) for said in chat(engine, number)]
        for future in submitted.values():
            with suppress(Cancelled):
                future.result(120)
    assert len(preempted) > 10
    return found, sum(item.follows for item in items)


def planned_items(scheduler: Any) -> list[PlanItem]:
    """All items that a scheduler plans from now on."""
    items, schedule = list[PlanItem](), scheduler.schedule

    def noting() -> Step:
        step: Step = schedule()
        items.extend(step.items)
        return step

    scheduler.schedule = noting
    return items


def chat(engine: Any, number: int) -> list[Completion]:
    """Rounds that each continue the one before; some of what was said is taken back."""
    ids, before, said = (*range(5, 30),), None, []
    for turn in range(4):
        request_id = f"chat-{number}-{turn}"
        request = Request(id=request_id, token_ids=ids, max_new_tokens=9, is_held=True, continues=before)
        said.append(submit(engine, request).result(120))
        ids, before = (*ids, *said[-1].token_ids[: 9 - number], turn), request_id
    return said


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_traffic_of_all_kinds_says_the_same(architecture: str, tmp_path: Path) -> None:
    rng = random.Random(architecture)
    world = build_world(architecture, tmp_path)
    traffic = random_traffic(world, rng, 70)
    requests = [request for _, _, request in traffic]
    one, none_ahead = answers(world, requests, 1, 1)
    two, num_ahead = answers(world, requests, 2, 2)
    assert not none_ahead
    assert num_ahead > 100
    for (kind, task, request), *both in zip(traffic, one, two, strict=False):
        assert shown(both[0]) == shown(both[1]), (kind, request.id)
        assert [len(each.scores) for each in both] == [request.num_scored] * 2
        if kind == "greedy":
            assert difference(both[1], expected_of(task, request)) is None
    assert [each.token_ids for each in one] == [each.token_ids for each in two]


def shown(said: Completion) -> object:
    """What is exactly the same in any company; log-probabilities are it to some digits."""
    searched = [[token.token_id for token in each.tokens] for each in said.hypotheses]
    return said.token_ids, said.finish, searched, [round(each.logprob, 3) for each in said.scores]
