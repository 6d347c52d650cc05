"""Requests that continue held ones say the same, at the cost of their new tokens only, and nothing leaks."""

import asyncio
import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from app.engine.engine import Engine, EngineConfig
from app.engine.statistics import StepStats
from app.errors import Cancelled, RequestFailed
from app.models.decoder_only import DecoderOnly
from app.prompt import Prompt, VersionDraft
from app.request import Request, SamplingParams, Segment, TokenDelta
from app.store.cache.prompt_cache import PromptCache
from app.store.prompt_store import open_store
from benchmarks.completions import Completion, submit, submit_all
from tests import oracle
from tests.engine.conftest import often_preempted
from tests.engine.test_isolation import poisoned
from tests.tiny_models import VOCABULARY, packed_backbone, tiny_model
from tests.waiting import wait_until

BLOCK_SIZE = 4


@dataclass
class Running:
    """An engine, and what its steps did."""

    engine: Engine
    steps: list[StepStats] = field(default_factory=list)
    num_rests: int = 0  # how often nothing was left to do

    def __post_init__(self) -> None:
        rest = self.engine._loop._rest

        def count_and_rest() -> None:
            rest()
            self.num_rests += 1

        self.engine._loop._rest = count_and_rest  # type: ignore[method-assign]

    def say(self, request: Request) -> Completion:
        return submit(self.engine, request).result(60)

    def computed(self) -> int:
        """Tokens that all steps so far took through the model."""
        self.rest()
        return sum(
            each.num_decode_rows + each.num_prefill_tokens + each.num_prefix_tokens for each in self.steps
        )

    def reused(self) -> int:
        self.rest()
        return sum(each.num_reused_tokens for each in self.steps)

    def rest(self) -> None:
        """Wait until nothing is open, and all steps are counted."""
        before = self.num_rests
        self.engine.release("so that it looks whether there is anything to do")
        wait_until(lambda: self.num_rests > before)

    def held(self) -> int:
        """How many are held once the engine has taken all messages, and proved that nothing is lost."""
        self.rest()
        return self.engine.stats().num_held


@contextmanager
def running(
    backbone: DecoderOnly, root: Path, *prompts: Prompt, num_blocks: int = 400, **config: int
) -> Iterator[Running]:
    store = open_store(root / "store")
    for number, prompt in enumerate(prompts):
        store.publish(f"task-{number}", VersionDraft(prompt=prompt))
    source = PromptCache(store, host_bytes=1 << 20)
    slot_bytes = sum(group.bytes_per_slot(backbone.dtype) for group in backbone.kv_groups)
    settings = EngineConfig(
        **{"max_rows": 12, "token_budget": 64, "block_size": BLOCK_SIZE} | config,
        kv_cache_bytes=slot_bytes * BLOCK_SIZE * num_blocks,
    )
    steps: list[StepStats] = []
    engine = Engine(backbone, source, settings, on_step=steps.append)
    run = Running(engine, steps)
    engine.start()
    try:
        yield run
        assert engine.is_alive, engine.failure
    finally:
        engine.stop()
        source.close()


def ids(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(VOCABULARY) for _ in range(count))


def chain(
    run: Running, first: Request, rng: random.Random, *, continues: bool
) -> Iterator[tuple[Request, Completion]]:
    """Steps that take a part of what was said before, and some ids of their own."""
    request, before = replace(first, is_held=continues), None
    for number in range(5):
        request = replace(request, id=f"{first.id}-{number}-{continues}", continues=before)
        said = run.say(request)
        yield request, said
        before = request.id if continues else None
        kept = said.token_ids[: len(said.token_ids) - rng.choice((0, 0, 1, 3))]
        request = replace(request, token_ids=(*request.token_ids, *kept, *ids(rng, rng.choice((0, 1, 9)))))


@pytest.mark.parametrize(
    ("architecture", "in_flight"), [("llama", 1), ("gemma2", 1), ("gpt2", 1), ("gemma2", 2)]
)
def test_steps_that_continue_others_say_the_same(architecture: str, in_flight: int, tmp_path: Path) -> None:
    """With a learned soft prompt and a prefix, leading text, partly filled blocks and preemption."""
    rng = random.Random(architecture)
    base = tiny_model(architecture)
    models = [oracle.tuned(base, config(7), seed=1) for config in (oracle.soft_config, oracle.prefix_config)]
    prompts = [oracle.as_prompt(model, tmp_path / str(number)) for number, model in enumerate(models)]
    with running(packed_backbone(base), tmp_path, *prompts, steps_in_flight=in_flight) as run:
        often_preempted(run.engine)
        for prompt, model in zip((None, *prompts), (base, *models), strict=True):
            for text in ((), (11, 12, 13)):
                segments = oracle.segments(prompt, text)
                seed = rng.random()
                first = Request(
                    id=f"{seed}",
                    token_ids=ids(rng, rng.choice((1, 5, 30))),
                    segments=segments,
                    max_new_tokens=10,
                )
                steps = [[*chain(run, first, random.Random(seed), continues=each)] for each in (True, False)]
                for (request, said), (_, anew) in zip(*steps, strict=True):
                    assert said.token_ids == anew.token_ids
                    assert said.logprobs == pytest.approx(anew.logprobs, abs=1e-4)
                    alone = oracle.greedy(model, [*request.prompt_ids], 10)
                    assert list(said.token_ids) == alone.tokens
                    assert said.logprobs == pytest.approx(alone.logprobs, abs=1e-4)
        assert run.reused() > 200


def test_a_crowd_of_chains_with_little_memory_says_the_same(tmp_path: Path) -> None:
    """Held sequences are evicted, rows are preempted, and each is what it is alone."""
    rng, base = random.Random(3), tiny_model("gemma2")
    with running(packed_backbone(base), tmp_path, num_blocks=115) as run:
        rows = [
            Request(id=f"{i}", token_ids=ids(rng, 20), max_new_tokens=12, is_held=True) for i in range(10)
        ]
        for number in range(3):
            said = [future.result(60) for future in submit_all(run.engine, rows)]
            for request, each in zip(rows, said, strict=True):
                assert list(each.token_ids) == oracle.greedy(base, [*request.token_ids], 12).tokens
            rows = [
                replace(
                    request,
                    id=f"{number}-{request.id}",
                    token_ids=(*request.token_ids, *each.token_ids, *ids(rng, 3)),
                    continues=request.id,
                )
                for request, each in zip(rows, said, strict=True)
            ]
        assert run.reused()
        assert sum(step.num_preempted for step in run.steps)


@pytest.fixture(scope="module")
def llama() -> DecoderOnly:
    return packed_backbone(tiny_model("llama"))


def test_a_chain_costs_what_one_pass_over_its_text_costs(llama: DecoderOnly, tmp_path: Path) -> None:
    """Six steps of 20 tokens; each step's last token is taken by the next one."""
    with running(llama, tmp_path) as run:
        request, before = Request(id="0", token_ids=(1,) * 30, max_new_tokens=20, is_held=True), None
        for number in range(6):
            said = run.say(replace(request, id=str(number), continues=before))
            request, before = replace(request, token_ids=(*request.token_ids, *said.token_ids)), str(number)
        assert run.computed() == len(request.token_ids) - 1
        assert run.held() == 1, "each takes the place of what it continues"


@contextmanager
def gated(backbone: Any) -> Iterator[tuple[threading.Event, threading.Event]]:
    """An event that a pass through the model has begun, and one that lets it go on."""
    reached, gate = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        reached.set()
        assert gate.wait(60)

    hook = backbone.model.get_input_embeddings().register_forward_pre_hook(wait)
    try:
        yield reached, gate
    finally:
        gate.set()
        hook.remove()


def samples(request: Request, count: int) -> list[Request]:
    """Samples that share all of the prompt but its last token."""
    *shared, last = request.token_ids
    return [
        replace(
            request,
            id=f"{request.id}-{index}",
            segments=(*request.segments, Segment(token_ids=tuple(shared), is_kept=False)),
            token_ids=(last,),
            sampling=SamplingParams(do_sample=True, sample_index=index),
        )
        for index in range(count)
    ]


@pytest.mark.parametrize("max_rows", [12, 4, 1])
def test_a_vote_of_nine_prefills_its_prompt_once(max_rows: int, llama: DecoderOnly, tmp_path: Path) -> None:
    """Also where samples wait for a row, and those that run end all at once."""
    asked = samples(Request(id="v", token_ids=(1,) * 50, max_new_tokens=6), 9)
    with running(llama, tmp_path, max_rows=max_rows) as run:
        with gated(llama) as (_, gate):
            futures = submit_all(run.engine, asked)
            gate.set()
            for future in futures:
                future.result(60)
        run.rest()
        assert sum(step.num_prefix_tokens for step in run.steps) == 49
        assert sum(step.num_prefill_tokens for step in run.steps) == 9
        assert run.engine.stats().resident_prefixes == 0, "what they shared goes with the last one"
        assert run.engine.stats().kv_usage == 0


def score_all(run: Running, requests: Sequence[Request]) -> list[TokenDelta]:
    async def only(request: Request) -> TokenDelta:
        return [delta async for delta in run.engine.generate(request)][-1]

    async def all_of_them() -> list[TokenDelta]:
        with gated(run.engine.backbone) as (_, gate):
            tasks = [asyncio.ensure_future(only(request)) for request in requests]
            await asyncio.sleep(0)
            gate.set()
            return await asyncio.gather(*tasks)

    return asyncio.run(all_of_them())


def test_four_hundred_questions_cost_their_labels_and_one_prompt(llama: DecoderOnly, tmp_path: Path) -> None:
    """The input is computed once, each question once for its labels, and no label's last token at all."""
    rng = random.Random(1)
    text, questions = ids(rng, 60), [ids(rng, 5) for _ in range(400)]
    labels = [ids(rng, 1), ids(rng, 2), ids(rng, 3)]
    requests = [
        Request(
            id=f"{number}-{each}",
            token_ids=(question[-1], *label),
            segments=(
                Segment(token_ids=text, is_kept=False),
                Segment(token_ids=question[:-1], is_kept=False),
            ),
            num_scored=len(label),
            max_new_tokens=0,
        )
        for number, question in enumerate(questions)
        for each, label in enumerate(labels)
    ]
    with running(llama, tmp_path, max_rows=64, token_budget=256, max_queue=2000) as run:
        found = score_all(run, requests)
        num_labels, num_questions = 400 * 6, 400 * 4
        assert run.computed() == num_labels + num_questions + len(text)
        assert run.engine.stats().kv_usage == 0
    model = tiny_model("llama")
    for request, delta in [*zip(requests, found, strict=True)][::97]:
        assert delta.finish is not None
        assert [score.token_id for score in delta.scores] == list(request.token_ids[1:])
        with torch.no_grad():
            given = torch.tensor([request.prompt_ids])
            logprobs = model(given).logits[0].log_softmax(-1)
        place = len(request.prompt_ids) - request.num_scored
        for offset, score in enumerate(delta.scores):
            assert score.logprob == pytest.approx(
                float(logprobs[place + offset - 1, score.token_id]), abs=1e-4
            )


# -- what is held, and for how long --------------------------------------------------------------


def held(id_: str, **settings: Any) -> Request:
    defaults: dict[str, Any] = {"token_ids": tuple(range(1, 31)), "max_new_tokens": 10, "is_held": True}
    return Request(id=id_, **defaults | settings)


async def leave_after(engine: Engine, request: Request, count: int) -> list[int | None]:
    stream, said = engine.generate(request), []
    async for delta in stream:
        said.append(delta.token_id)
        if len(said) == count:
            break
    await stream.aclose()
    return said


def test_one_that_is_left_before_its_end_is_continued_too(llama: DecoderOnly, tmp_path: Path) -> None:
    """As a budget of reasoning does: cut at exactly so many tokens, whatever came after them meanwhile."""
    with running(llama, tmp_path) as run:
        said = asyncio.run(leave_after(run.engine, held("cut", max_new_tokens=250), 7))
        token_ids = (*range(1, 31), *said, 90, 91)
        following = run.say(held("next", token_ids=token_ids, continues="cut"))
        assert run.reused() >= 30 + 6, "the last token that was taken may not have been run yet"
        assert run.say(held("anew", token_ids=token_ids)).token_ids == following.token_ids


def test_what_is_released_or_was_never_there_is_computed_anew(llama: DecoderOnly, tmp_path: Path) -> None:
    with running(llama, tmp_path) as run:
        said = run.say(held("a")).token_ids
        again = held("b", token_ids=(*range(1, 31), *said), is_held=False)
        expected = run.say(again).token_ids
        for continues in ("a", "nothing", "b"):
            run.engine.release(continues)
            assert run.say(replace(again, continues=continues)).token_ids == expected
        assert run.reused() == 0
        assert run.held() == 0
        assert run.engine.stats().kv_usage == 0


def test_one_that_is_released_while_it_runs_leaves_nothing(llama: DecoderOnly, tmp_path: Path) -> None:
    async def leave() -> None:
        stream = run.engine.generate(held("a", max_new_tokens=250))
        await anext(stream)
        run.engine.release("a")
        await stream.aclose()

    with running(llama, tmp_path) as run:
        asyncio.run(leave())
        assert run.held() == 0
        assert run.engine.stats().kv_usage == 0


def test_a_client_that_leaves_frees_everything_within_two_steps(llama: DecoderOnly, tmp_path: Path) -> None:
    with running(llama, tmp_path) as run:
        other = submit(run.engine, Request(id="other", token_ids=(9,), max_new_tokens=200))
        asyncio.run(leave_after(run.engine, held("a", max_new_tokens=250), 3))
        before = len(run.steps)
        run.engine.release("a")
        wait_until(lambda: len(run.steps) > before + 2 or other.done())
        assert run.engine.stats().num_held == 0
        other.result(60)
        assert run.held() == 0
        assert run.engine.stats().kv_usage == 0


def test_there_are_so_many_and_blocks_are_taken_from_the_oldest_first(
    llama: DecoderOnly, tmp_path: Path
) -> None:
    with running(llama, tmp_path, num_blocks=45) as run:
        run.engine._scheduler.residency.held.max_held = 3
        for number in range(4):
            run.say(held(str(number)))
        assert run.held() == 3
        again = [
            held(f"again {n}", token_ids=(*range(1, 31), 5), continues=str(n), max_new_tokens=1)
            for n in (0, 3)
        ]
        for request in again:
            run.say(replace(request, is_held=False))
        assert run.reused() == 30, "of the last one only"
        run.say(Request(id="large", token_ids=(1,) * 110, max_new_tokens=1))
        assert run.held() == 1
        run.say(replace(again[1], id="still there"))
        assert run.reused() == 60


def test_a_request_that_fills_the_memory_runs_whatever_is_held(llama: DecoderOnly, tmp_path: Path) -> None:
    """Even of what it continues, as much as is needed goes; its last block is its own then."""
    with running(llama, tmp_path, num_blocks=20) as run:
        run.say(held("a", max_new_tokens=8))
        said = run.say(held("large", token_ids=(*range(1, 31), 7, 7), max_new_tokens=48, continues="a"))
        assert len(said.token_ids) == 48
        assert run.reused() == 30
        assert run.held() == 1


def test_samples_that_share_a_prompt_are_continued_with_it(llama: DecoderOnly, tmp_path: Path) -> None:
    """Also where what continues them has no shared part, or another one."""
    with running(llama, tmp_path) as run:
        first = samples(held("v", token_ids=tuple(range(1, 42))), 3)
        said = [future.result(60).token_ids for future in submit_all(run.engine, first)]
        assert run.held() == 3
        for cut in (0, 40, 47):
            for request, its in zip(first, said, strict=True):
                text = (*range(1, 42), *its, 8)
                again = replace(
                    request,
                    id=f"{request.id}-{cut}",
                    segments=(Segment(token_ids=text[:cut], is_kept=False),) if cut else (),
                    token_ids=text[cut:],
                    continues=request.id,
                    is_held=False,
                )
                before = run.reused()
                assert (
                    run.say(again).token_ids == run.say(replace(again, id="anew", continues=None)).token_ids
                )
                assert run.reused() - before == 10, (
                    "the last token of the prompt, and all but one of the answer"
                )
        for request in first:
            run.engine.release(request.id)
        assert run.held() == 0
        assert run.engine.stats().resident_prefixes == 0


def test_scores_are_those_of_the_whole_text(llama: DecoderOnly, tmp_path: Path) -> None:
    """What comes before a scored token is computed, whatever is held."""
    with running(llama, tmp_path) as run:
        run.say(held("a"))
        scored = held("s", num_scored=12, continues="a", max_new_tokens=1)
        (with_reuse,) = score_all(run, [scored])
        assert run.reused() == 30 - 12 - 1
        (anew,) = score_all(run, [replace(scored, continues=None)])
        assert [score.token_id for score in with_reuse.scores] == [*range(19, 31)]
        for one, other in zip(with_reuse.scores, anew.scores, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_what_fails_while_it_is_left_is_not_held(llama: DecoderOnly, tmp_path: Path) -> None:
    """It is closed while its second chunk is under way, which fails."""
    with running(llama, tmp_path) as run, poisoned(llama, 200), gated(llama) as (reached, gate):
        failing = submit(run.engine, held("a", token_ids=(1,) * 99 + (200,)))
        assert reached.wait(60)
        run.engine.cancel("a")
        gate.set()
        with pytest.raises(Cancelled):
            failing.result(60)
        assert run.held() == 0
        assert run.engine.stats().kv_usage == 0


def test_a_failed_pass_leaves_nothing_held(llama: DecoderOnly, tmp_path: Path) -> None:
    with running(llama, tmp_path) as run:
        said = run.say(held("a")).token_ids
        with poisoned(llama, 200), pytest.raises(RequestFailed):
            run.say(held("bad", token_ids=(*range(1, 31), *said, 200), continues="a"))
        assert run.held() == 1, "what it continued is as good as before"
        again = held("b", token_ids=(*range(1, 31), *said), continues="a", is_held=False)
        assert run.say(again).token_ids == run.say(replace(again, id="c", continues=None)).token_ids
