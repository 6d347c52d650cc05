"""With guesses every request gets the tokens that it gets without: greedy or drawn, whatever its rules.

Blocks are scarce, so rows are preempted; rows that guess, rows that don't, prefills and prefixes are mixed.
"""

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from app.engine.blocks import SlotTable
from app.engine.engine import Engine, EngineConfig
from app.engine.plan import StepResult
from app.engine.sampling.inputs import SampledToken
from app.engine.scheduler import Scheduler
from app.engine.sequence import Sequence
from app.engine.statistics import StepStats
from app.engine.step import Step
from app.models.attention import kv_cache
from app.request import FinishReason, Request, SamplingParams, TokenDelta, TokenRules
from benchmarks.completions import submit, submit_all
from tests import oracle
from tests.engine.conftest import Bench
from tests.engine.sampling.test_sampler import chi_square_limit
from tests.engine.test_encoder_decoder import nan_pool
from tests.engine.test_exactness import (
    TinyTask,
    build_world,
    crowded_engine,
    difference,
    expected_of,
    is_windowed,
)
from tests.engine.test_scheduler import FULL, geometry, new_scheduler
from tests.tiny_models import VOCABULARY

MOST = 4
FEW = tuple((id_, 60.0) for id_ in (7, 8, 9))  # tokens that alone come: a text of few words repeats itself
SAMPLED = SamplingParams(do_sample=True, logit_bias=FEW, temperature=2.0)
PARAMETERS: dict[str, SamplingParams] = {
    "greedy": SamplingParams(),
    "drawn": SAMPLED,
    "top-p": replace(SAMPLED, top_p=0.7, seed=3),
    "shaped": replace(SAMPLED, typical_p=0.9, seed=4),
    "penalties": replace(SAMPLED, repetition_penalty=1.1, frequency_penalty=0.5, presence_penalty=0.1),
    "greedy penalties": SamplingParams(logit_bias=FEW, frequency_penalty=3.0),
    "rules": replace(
        SAMPLED,
        rules=TokenRules(
            sequence_bias=(((7, 8), 2.5),),
            bad_words=((9, 9),),
            encoder_repetition_penalty=1.2,
            no_repeat_ngram_size=5,
            min_new_tokens=9,
            stop_ids=(8,),
            eos_ids=(8,),
            length_decay=(12, 1.02),
            forced_last=(9,),
            max_new_tokens=40,
        ),
    ),
    "beams": SamplingParams(num_beams=2),
}


def requests_of(tasks: list[TinyTask], rng: random.Random) -> list[tuple[TinyTask, Request]]:
    """Each way to choose tokens over some tasks; prompts repeat themselves."""
    asked = []
    for number, (name, task) in enumerate(product(PARAMETERS, rng.sample(tasks, 4))):
        phrase = [rng.choice([7, 8, 9, rng.randrange(VOCABULARY)]) for _ in range(rng.choice([3, 9, 20]))]
        request = Request(
            id=f"{number}-{name}-{task.name}",
            token_ids=tuple(phrase * rng.choice([1, 2, 3])),
            segments=oracle.segments(task.prompt, task.resident_ids),
            max_new_tokens=40,
            sampling=PARAMETERS[name],
            num_top=rng.choice([0, 3]),
            stop_ids=frozenset({8} if name == "rules" else ()),
            task=task.name,
        )
        asked.append((task, request))
    rng.shuffle(asked)
    return asked


async def _deltas(engine: Engine, request: Request) -> list[TokenDelta]:
    return [delta async for delta in engine.generate(request)]


async def _all_deltas(engine: Engine, requests: list[Request]) -> list[list[TokenDelta]]:
    return await asyncio.gather(*(_deltas(engine, request) for request in requests))


def answers(engine: Engine, requests: list[Request]) -> list[list[TokenDelta]]:
    return asyncio.run(_all_deltas(engine, requests))


def numbers(deltas: list[TokenDelta]) -> list[float]:
    """All that is reported of an answer's tokens but their ids."""
    tops = [value for delta in deltas for _, value in delta.top]
    found = [token.logprob for delta in deltas for each in delta.hypotheses for token in each.tokens]
    return [*(delta.logprob for delta in deltas), *tops, *found]


def ids(deltas: list[TokenDelta]) -> list[object]:
    tokens = [(delta.token_id, [id_ for id_, _ in delta.top], delta.finish) for delta in deltas]
    return [tokens, [token.token_id for each in deltas[-1].hypotheses for token in each.tokens]]


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2", "gpt2"])
def test_a_crowded_mixed_batch_says_the_same_with_guesses(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy answers are those of the model's own `generate`, too. Memory is NaN at first."""
    monkeypatch.setattr(kv_cache, "_pool", nan_pool)
    world = build_world(architecture, tmp_path)
    asked = requests_of(world.tasks, random.Random(architecture))
    requests = [request for _, request in asked]
    steps: list[StepStats] = []
    with (
        crowded_engine(world, [], num_blocks=108) as plain,
        crowded_engine(world, steps, num_blocks=108, speculate=MOST) as guessing,
    ):
        expected = answers(plain, requests)
        found = answers(guessing, requests)
        greedy = [(task, request) for task, request in asked if request.sampling == SamplingParams()]
        alone = [submit(guessing, replace(request, id="alone")).result(60) for _, request in greedy]
    assert [*map(ids, found)] == [*map(ids, expected)]
    for ours, others in zip(map(numbers, found), map(numbers, expected), strict=True):
        assert ours == pytest.approx(others, abs=1e-4)
    wrong = [
        difference(answer, expected_of(task, request))
        for (task, request), answer in zip(greedy, alone, strict=True)
    ]
    assert set(wrong) == {None}
    guessed, accepted = (sum(each) for each in zip(*map(counts, steps), strict=True))
    assert guessed > accepted > 100, "guesses were right, and wrong"
    num_preempted = sum(step.num_preempted for step in steps)
    assert num_preempted or is_windowed(world), "blocks are scarce; windows grow little"


def counts(step: StepStats) -> tuple[int, int]:
    return step.num_speculated_tokens, step.num_accepted_tokens


@contextmanager
def guessing_engine(bench: Bench, steps: list[StepStats]) -> Iterator[Engine]:
    config = EngineConfig(max_rows=8, token_budget=256, kv_cache_bytes=8 << 20, speculate=MOST)
    engine = Engine(bench.backbone, bench.source, config, on_step=steps.append)
    engine.start()
    yield engine
    engine.stop()
    assert engine.failure is None


def test_what_copies_takes_fewer_steps(bench: Bench) -> None:
    steps: list[StepStats] = []
    loop = bench.request("loop", max_new_tokens=60, sampling=SamplingParams(logit_bias=((7, 90.0),)))
    with guessing_engine(bench, steps) as engine:
        found = submit(engine, loop).result(60)
    assert found.token_ids == (7,) * 60
    assert len(steps) < 60 / 3
    guessed, accepted = (sum(each) for each in zip(*map(counts, steps), strict=True))
    assert guessed == accepted == 60 - len(steps)
    assert sum(step.new_tokens for step in steps) == 60
    assert sum(len(step.inter_token_latencies) for step in steps) == 59


def test_the_end_within_right_guesses_is_the_end(bench: Bench) -> None:
    """A stop id that was guessed, and the last token that was asked for."""
    phrase = (7, 8, 9, 4)
    order = tuple(((a, b), 90.0) for a, b in zip(phrase, (*phrase[1:], phrase[0]), strict=True))
    params = SamplingParams(rules=TokenRules(sequence_bias=order))
    steps: list[StepStats] = []
    asked = bench.request("r", token_ids=phrase * 3, max_new_tokens=30, sampling=params)
    with guessing_engine(bench, steps) as engine:
        whole = submit(engine, asked).result(60)
        ended = submit(engine, replace(asked, stop_ids=frozenset({phrase[3]}))).result(60)
        short = [submit(engine, replace(asked, max_new_tokens=count)).result(60) for count in range(1, 8)]
    assert whole.token_ids == (phrase * 8)[:30]
    assert (ended.token_ids, ended.finish) == (phrase, FinishReason.EOS)
    assert [each.token_ids for each in short] == [whole.token_ids[:count] for count in range(1, 8)]
    assert {each.finish for each in short} == {FinishReason.LENGTH}
    assert sum(accepted for _, accepted in map(counts, steps)) > 30


def test_samples_with_guesses_follow_the_models_own_distribution(bench: Bench) -> None:
    """All answers of three tokens out of three, of which the text before has each pair."""
    prompt = (7, 7, 8, 8, 9, 9, 7, 9, 8, 7)
    params = SamplingParams(
        do_sample=True, temperature=3.0, logit_bias=tuple((id_, 400.0) for id_ in (7, 8, 9))
    )
    words = [*product((7, 8, 9), repeat=3)]
    with torch.inference_mode():
        logits = bench.base(torch.tensor([(*prompt, *word) for word in words])).logits[
            :, len(prompt) - 1 : -1
        ]
    chances = (logits[..., 7:10] / 3.0).double().softmax(-1)  # [27, 3, 3]
    picked = chances.gather(-1, torch.tensor(words)[..., None] - 7)
    expected = picked.prod(dim=1).squeeze(1).numpy() * 2000
    steps: list[StepStats] = []
    observed = dict.fromkeys(words, 0)
    with guessing_engine(bench, steps) as engine:
        for seeds in (range(1000), range(1000, 2000)):  # the queue is bounded
            asked = [
                bench.request(
                    f"r{seed}", token_ids=prompt, max_new_tokens=3, sampling=replace(params, seed=seed)
                )
                for seed in seeds
            ]
            for future in submit_all(engine, asked):
                observed[future.result(60).token_ids] += 1
    statistic = float(((np.array([*observed.values()]) - expected) ** 2 / expected).sum())
    assert expected.min() > 5
    assert statistic < chi_square_limit(len(words) - 1)
    guessed, accepted = (sum(each) for each in zip(*map(counts, steps), strict=True))
    assert guessed > 1000, "nearly all answers had a guess in them"
    assert accepted > 100


def looping(scheduler: Scheduler, count: int) -> list[Sequence]:
    """Rows of one repeated token, which have the first of their own."""
    rows = [Sequence(Request(id=str(n), token_ids=(5,) * 6, max_new_tokens=60)) for n in range(count)]
    for row in rows:
        scheduler.add(row)
    while not all(row.is_decoding for row in rows):
        go_on(scheduler)
    return rows


def go_on(scheduler: Scheduler) -> Step:
    step = scheduler.schedule()
    tokens = {
        item.id: (SampledToken(5, 0.0, True),) * len(item.sampling) for item in step.items if item.sampling
    }
    scheduler.update(step, StepResult(tokens), 0.0)
    return step


def test_guesses_take_no_block_that_anything_else_needs() -> None:
    scheduler = new_scheduler(geometry(DECODER_SELF=(FULL,)))
    (row,) = looping(scheduler, 1)
    table, blocks = row.table, scheduler.residency.blocks
    assert table is not None
    others = SlotTable(blocks)
    while table.end - row.next_slot < 3:
        assert go_on(scheduler).counts.accepted > 0
    assert others.grow(0, (int(blocks.num_free[0]) - 1) * blocks.block_size), "the last one is the row's"
    end, num_guessed = table.end, 0
    while (num_left := end - row.next_slot) > 1:
        step = go_on(scheduler)
        assert step.counts.speculated < num_left
        num_guessed += step.counts.speculated
    assert num_guessed > 0, "within the blocks that it has"
    assert table.end == end
    others.release()
    go_on(scheduler)
    assert go_on(scheduler).counts.speculated > 0


def test_guesses_come_after_prefills() -> None:
    scheduler = new_scheduler(geometry(DECODER_SELF=(FULL,)))
    looping(scheduler, 1)
    scheduler.add(Sequence(Request(id="long", token_ids=tuple(range(60)), max_new_tokens=1)))
    step = go_on(scheduler)
    assert step.budget == 0
    assert not step.counts.speculated


def test_tokens_of_guesses_are_charged_as_others() -> None:
    scheduler = new_scheduler()
    (row,) = looping(scheduler, 1)
    served = scheduler.waiting._tenants._served
    before, num_generated = served[""], row.num_generated
    step = go_on(scheduler)
    assert served[""] - before == row.num_generated - num_generated == 1 + step.counts.accepted > 1
