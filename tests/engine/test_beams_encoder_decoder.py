"""Beams of encoder-decoders: all answers and scores are those of `generate`, over one pass of the encoder."""

import random
from pathlib import Path
from typing import Any

import pytest

from app.engine.statistics import StepStats
from app.request import Request, SamplingParams, TokenRules
from benchmarks.completions import submit_all
from tests import beam_oracle
from tests.engine.conftest import often_preempted
from tests.engine.seq2seq import World, build_world
from tests.engine.test_encoder_decoder import engine_of, ids
from tests.engine.test_exactness import difference
from tests.tiny_models import VOCABULARY

NEW = 12
TASKS = ("none", "soft-9", "peft-prefix")  # what generate can express
RULES: tuple[dict[str, Any], ...] = (
    {},
    {"no_repeat_ngram_size": 2},
    {"min_length": 7},
    {"encoder_no_repeat_ngram_size": 2, "encoder_repetition_penalty": 1.3},
    {"forced_bos_token_id": 9, "forced_eos_token_id": 4},
)


def random_search(world: World, number: int, rng: random.Random) -> tuple[Request, dict[str, Any]]:
    """A request, and what `generate` calls its rules."""
    settings = dict(RULES[number % len(RULES)])
    stop_ids = frozenset({4, *rng.sample(range(10, VOCABULARY), rng.choice((0, 9)))})
    forced_last = settings.get("forced_eos_token_id")
    rules = TokenRules(
        stop_ids=tuple(stop_ids),
        eos_ids=tuple(stop_ids),
        max_new_tokens=NEW,
        no_repeat_ngram_size=settings.get("no_repeat_ngram_size", 0),
        encoder_no_repeat_ngram_size=settings.get("encoder_no_repeat_ngram_size", 0),
        encoder_repetition_penalty=settings.get("encoder_repetition_penalty", 1.0),
        min_new_tokens=max(0, settings.get("min_length", 1) - 1),  # the start token counts as well
        forced_first=settings.get("forced_bos_token_id"),
        forced_last=() if forced_last is None else (forced_last,),
    )
    sampling = SamplingParams(
        num_beams=rng.choice((2, 3, 4, 5)),
        length_penalty=rng.choice((-0.5, 0.0, 1.0, 2.0)),
        early_stopping=rng.choice((True, False, "never")),
        rules=rules,
    )
    task = world.task(TASKS[number % len(TASKS)])
    read = ids(rng, rng.choice((1, 6, 20, 45)))
    request = task.request(f"s{number}", read, max_new_tokens=NEW, sampling=sampling, stop_ids=stop_ids)
    return request, settings


@pytest.mark.parametrize("architecture", ["t5", "bart", "mbart", "pegasus", "marian"])
def test_all_answers_and_scores_are_those_of_generate(architecture: str, tmp_path: Path) -> None:
    world = build_world(architecture, tmp_path)
    rng = random.Random(architecture)
    searches = [random_search(world, number, rng) for number in range(10)]
    greedy = [world.task(name).request(f"g-{name}", ids(rng, 8), max_new_tokens=NEW) for name in TASKS]
    requests = [request for request, _ in searches] + greedy
    steps: list[StepStats] = []
    with engine_of(world, steps, num_blocks=48, max_rows=16) as engine:
        preempted = often_preempted(engine)
        found = [each.result(120) for each in submit_all(engine, requests)]
        assert engine.failure is None
    for (request, settings), each in zip(searches, found[: len(searches)], strict=True):
        wanted = beam_oracle.searched(world.task(request.task).model, request, **settings)
        beam_oracle.check(each.hypotheses, wanted)
    for request, each in zip(greedy, found[len(searches) :], strict=True):
        assert difference(each, world.expected(world.task(request.task), request)) is None
    assert any(step.num_beam_rows and step.num_sources for step in steps), "encoded beside beams"
    assert sum(step.num_copied_blocks for step in steps)
    assert any(row.beams is not None and row.num_generated for row in preempted), "in mid-search"
    world.source.close()


def test_beams_share_one_pass_of_the_encoder(tmp_path: Path) -> None:
    world = build_world("bart", tmp_path)
    steps: list[StepStats] = []
    request = world.task("none").request(
        "r", tuple(range(5, 35)), max_new_tokens=NEW, sampling=SamplingParams(num_beams=4)
    )
    with engine_of(world, steps) as engine:
        (found,) = (each.result(60) for each in submit_all(engine, [request]))
    assert len(found.hypotheses) == 4
    assert sum(step.num_encoder_tokens for step in steps) == 30
    assert max(step.num_beam_rows for step in steps) == 4
    world.source.close()
