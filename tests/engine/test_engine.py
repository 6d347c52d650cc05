"""The running engine: how requests end, what they leave behind, and what happens when things break."""

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from app.engine.engine import Engine, EngineConfig
from app.engine.statistics import StepStats
from app.errors import (
    Cancelled,
    CorruptData,
    DeadlineExceeded,
    EngineStopped,
    InvalidRequest,
    NonFiniteLogits,
    Overloaded,
    PromptRejected,
    RequestTooLong,
)
from app.models.attention.metadata import StepMetadata
from app.models.decoder_only import DecoderOnly
from app.prompt import ModelGeometry, Prompt, VersionDraft
from app.request import FinishReason, Request, Segment, TokenDelta
from benchmarks.completions import submit, submit_all
from tests import oracle
from tests.engine.conftest import Bench
from tests.waiting import PATIENCE, wait_until


def overflowing_prompt(bench: Bench, directory: Path) -> Prompt:
    """A prefix whose numbers are finite but whose scores are not: a real source of NaN."""
    model = oracle.tuned(bench.base, oracle.prefix_config(4), seed=1)
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.mul_(1e38)
    prompt = oracle.as_prompt(model, directory)
    bench.store.publish("overflow", VersionDraft(prompt=prompt))
    return prompt


# -- isolation -----------------------------------------------------------------------------------


def test_one_row_with_nan_fails_alone_among_sixteen(
    bench: Bench, soft_prompt: Prompt, tmp_path: Path
) -> None:
    bad = overflowing_prompt(bench, tmp_path / "overflow")
    good = [
        bench.request(
            f"r{i}", soft_prompt if i % 2 else None, token_ids=tuple(range(1, 3 + i)), max_new_tokens=40
        )
        for i in range(15)
    ]
    clean = [submit(bench.engine, request).result(60) for request in good]
    futures = [submit(bench.engine, request) for request in good[:8]]
    poisoned = submit(bench.engine, bench.request("bad", bad, max_new_tokens=40))
    futures += [submit(bench.engine, request) for request in good[8:]]
    with pytest.raises(NonFiniteLogits, match="NaN or infinite logits"):
        poisoned.result(60)
    assert [future.result(60).token_ids for future in futures] == [each.token_ids for each in clean]
    assert max(step.num_running for step in bench.steps) >= 15
    again = [submit(bench.engine, request) for request in good]  # in the slots that the bad row left
    assert [future.result(60).token_ids for future in again] == [each.token_ids for each in clean]


def test_a_prefix_is_built_once_and_shared(bench: Bench, soft_prompt: Prompt) -> None:
    first = submit(bench.engine, bench.request("first", soft_prompt)).result(60)
    others = [submit(bench.engine, bench.request(f"r{i}", soft_prompt)) for i in range(20)]
    assert {future.result(60).token_ids for future in others} == {first.token_ids}
    assert sum(step.num_prefix_tokens for step in bench.steps) == soft_prompt.num_virtual_tokens
    assert sum(step.prefix_misses for step in bench.steps) == 1
    assert sum(step.prefix_hits for step in bench.steps) == 20
    assert bench.engine.stats().resident_digests == {soft_prompt.digest}


# -- ends ----------------------------------------------------------------------------------------


def test_stop_ids_and_length_end_a_request(bench: Bench) -> None:
    free = submit(bench.engine, bench.request("free", max_new_tokens=10)).result(60)
    assert free.finish is FinishReason.LENGTH
    assert len(free.token_ids) == len(free.logprobs) == 10
    stop = free.token_ids[4]
    first = free.token_ids.index(stop)
    stopped = submit(
        bench.engine, bench.request("stop", max_new_tokens=10, stop_ids=frozenset({stop}))
    ).result(60)
    assert stopped.finish is FinishReason.EOS
    assert stopped.token_ids == free.token_ids[: first + 1], "the id that stops is reported"


def test_cancelling_frees_everything_within_two_steps(bench: Bench, soft_prompt: Prompt) -> None:
    long = [bench.request(f"r{i}", soft_prompt, max_new_tokens=250) for i in range(4)]
    kept = submit(bench.engine, replace(long[0], id="kept"))
    futures = [submit(bench.engine, request) for request in long]
    wait_until(lambda: any(step.num_running == 5 for step in bench.steps))
    for request in long:
        bench.engine.cancel(request.id)
    before = len(bench.steps)
    wait_until(lambda: len(bench.steps) > before + 2)
    assert bench.steps[before + 2].num_running == 1
    for future in futures:
        with pytest.raises(Cancelled):
            future.result(60)
    assert len(kept.result(60).token_ids) == 250
    bench.engine.cancel("nobody knows this one")
    assert submit(bench.engine, bench.request("after")).result(60).token_ids


def test_a_deadline_ends_running_and_waiting_requests(bench: Bench) -> None:
    soon = time.monotonic() + 0.05
    running = submit(bench.engine, bench.request("late", max_new_tokens=300, deadline=soon))
    past = submit(bench.engine, bench.request("past", deadline=time.monotonic() - 1))
    with pytest.raises(DeadlineExceeded, match="generated tokens"):
        running.result(60)
    with pytest.raises(DeadlineExceeded):
        past.result(60)
    in_time = bench.request("in time", deadline=time.monotonic() + 60)
    assert submit(bench.engine, in_time).result(60).token_ids


def test_timings_add_up(bench: Bench) -> None:
    started = time.monotonic()
    timings = submit(bench.engine, bench.request("timed", max_new_tokens=20)).result(60).timings
    elapsed = time.monotonic() - started
    assert min(timings.queue, timings.prefill, timings.decode) >= 0
    assert timings.queue + timings.prefill + timings.decode <= elapsed


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"token_ids": ()}, InvalidRequest, "at least one prompt token"),
        ({"max_new_tokens": -1}, InvalidRequest, "0 or more new ones"),
        ({"token_ids": (5, 211)}, InvalidRequest, "0 to 210"),
        ({"segments": (Segment(token_ids=(-1,)),)}, InvalidRequest, "0 to 210"),
        ({"segments": (Segment(prompt_digest="0" * 64),)}, InvalidRequest, "come together"),
        ({"segments": (Segment(num_virtual_tokens=3),)}, InvalidRequest, "come together"),
        ({"segments": (Segment(),)}, InvalidRequest, "a learned prompt or text"),
        ({"deadline": float("inf")}, InvalidRequest, "finite"),
        ({"deadline": float("nan")}, InvalidRequest, "finite"),
        ({"max_new_tokens": 400}, RequestTooLong, "0 virtual \\+ 3 prompt \\+ 400 new .* 320 positions"),
    ],
)
def test_impossible_requests_are_refused_at_once(
    bench: Bench, settings: dict[str, object], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        submit(bench.engine, bench.request("bad", **settings))
    assert submit(bench.engine, bench.request("good")).result(60).token_ids


def test_what_needs_more_memory_than_there_is_is_refused(llama_backbone: DecoderOnly, bench: Bench) -> None:
    slot = sum(group.bytes_per_slot(llama_backbone.dtype) for group in llama_backbone.kv_groups)
    engine = Engine(llama_backbone, bench.source, EngineConfig(kv_cache_bytes=slot * 16 * 3))
    engine.start()
    with pytest.raises(RequestTooLong, match="the server has 48"):
        submit(engine, Request(id="big", token_ids=(1,) * 40, max_new_tokens=20))
    assert submit(engine, Request(id="fits", token_ids=(1,) * 40, max_new_tokens=8)).result(60).token_ids
    engine.stop()


def test_no_room_for_a_single_block_says_so(llama_backbone: DecoderOnly, bench: Bench) -> None:
    with pytest.raises(ValueError, match="PROMPTPLEX_KV_CACHE_BYTES"):
        Engine(llama_backbone, bench.source, EngineConfig(kv_cache_bytes=100))


def test_the_queue_is_bounded(llama_backbone: DecoderOnly, bench: Bench) -> None:
    engine = Engine(
        llama_backbone, bench.source, EngineConfig(max_rows=1, max_queue=2, kv_cache_bytes=1 << 20)
    )
    engine.start()
    futures = [submit(engine, bench.request(f"r{i}", max_new_tokens=200)) for i in range(3)]
    with pytest.raises(Overloaded) as refusal:
        submit(engine, bench.request("one too many"))
    assert refusal.value.retry_after > 0
    assert [len(future.result(60).token_ids) for future in futures] == [200] * 3
    engine.stop()


def test_a_request_id_is_used_once_at_a_time(bench: Bench) -> None:
    running = submit(bench.engine, bench.request("same", max_new_tokens=200))
    with pytest.raises(InvalidRequest, match="already running"):
        submit(bench.engine, bench.request("same"))
    running.result(60)
    submit(bench.engine, bench.request("same")).result(60)


# -- prompts that don't come ---------------------------------------------------------------------


def test_a_prompt_that_is_not_there_fails_only_its_own_requests(bench: Bench) -> None:
    missing = bench.request("missing", segments=(Segment(prompt_digest="0" * 64, num_virtual_tokens=4),))
    lost = submit(bench.engine, missing)
    other = submit(bench.engine, bench.request("other"))
    with pytest.raises(CorruptData):
        lost.result(60)
    assert other.result(60).token_ids


def test_a_prompt_that_differs_from_its_manifest_is_not_used(bench: Bench, soft_prompt: Prompt) -> None:
    wrong = bench.request("wrong", replace(soft_prompt, num_virtual_tokens=5))
    with pytest.raises(PromptRejected, match="expected: 5 virtual tokens; found: 6"):
        submit(bench.engine, wrong).result(60)
    right = submit(bench.engine, bench.request("right", soft_prompt)).result(60)
    with pytest.raises(PromptRejected):  # also when the prompt is resident already
        submit(bench.engine, wrong).result(60)
    assert submit(bench.engine, bench.request("right", soft_prompt)).result(60).token_ids == right.token_ids


class SlowSource:
    """A prompt source whose answers come when the test says so."""

    def __init__(self) -> None:
        self.pending: list[Future[Prompt]] = []

    def load(self, digest: str) -> "Future[Prompt]":
        self.pending.append(Future())
        return self.pending[-1]


@pytest.fixture
def slow(llama_backbone: DecoderOnly) -> Iterator[tuple[Engine, SlowSource]]:
    source = SlowSource()
    engine = Engine(llama_backbone, source, EngineConfig(kv_cache_bytes=1 << 20))
    engine.start()
    yield engine, source
    engine.stop()


def test_a_loading_prompt_parks_only_its_own_requests(
    bench: Bench, soft_prompt: Prompt, slow: tuple[Engine, SlowSource]
) -> None:
    engine, source = slow
    parked = submit(engine, bench.request("parked", soft_prompt))
    assert submit(engine, bench.request("free")).result(60).token_ids
    assert not parked.done()
    source.pending[0].set_result(soft_prompt)
    expected = submit(bench.engine, bench.request("expected", soft_prompt)).result(60)
    assert parked.result(60).token_ids == expected.token_ids


def test_a_parked_request_obeys_its_deadline_and_cancellation(
    bench: Bench, soft_prompt: Prompt, slow: tuple[Engine, SlowSource]
) -> None:
    engine, source = slow
    late = submit(engine, bench.request("late", soft_prompt, deadline=time.monotonic() + 0.05))
    left = submit(engine, bench.request("left", soft_prompt))
    with pytest.raises(DeadlineExceeded):
        late.result(60)
    engine.cancel("left")
    with pytest.raises(Cancelled):
        left.result(60)
    for future in source.pending:
        future.set_result(soft_prompt)
    assert submit(engine, bench.request("after")).result(60).token_ids


def ends_by_itself_before_its_deadline(bench: Bench, request_id: str) -> float:
    """A short request that met a deadline, as near as this machine allows; the deadline."""
    for seconds in (0.3, 1, 3, 10, 30):
        deadline = time.monotonic() + seconds
        with suppress(DeadlineExceeded):
            submit(bench.engine, bench.request(request_id, max_new_tokens=2, deadline=deadline)).result(60)
            return deadline
    raise AssertionError("two tokens take more than half a minute")


def test_an_id_that_is_used_again_has_its_own_deadline_and_stream(bench: Bench) -> None:
    soon = ends_by_itself_before_its_deadline(bench, "again")
    while time.monotonic() < soon:
        endless = submit(bench.engine, bench.request("again", max_new_tokens=300))
        assert len(endless.result(60).token_ids) == 300

    async def leave_and_return() -> list[int | None]:
        other = asyncio.ensure_future(_tokens(bench.request("other", max_new_tokens=100)))
        stream = bench.engine.generate(bench.request("again", max_new_tokens=50))
        async for _ in stream:
            break
        await stream.aclose()
        second = await _when_it_is_free(bench.request("again", token_ids=(9, 8), max_new_tokens=6))
        await other
        return second

    async def _when_it_is_free(request: Request) -> list[int | None]:
        give_up = time.monotonic() + PATIENCE
        while True:
            try:
                return await _tokens(request)
            except InvalidRequest:
                assert time.monotonic() < give_up, "a cancelled request keeps its id"
                await asyncio.sleep(0.005)

    async def _tokens(request: Request) -> list[int | None]:
        return [delta.token_id async for delta in bench.engine.generate(request)]

    alone = submit(bench.engine, bench.request("alone", token_ids=(9, 8), max_new_tokens=6)).result(60)
    assert asyncio.run(leave_and_return()) == list(alone.token_ids)


# -- asyncio -------------------------------------------------------------------------------------


def test_generate_streams_the_same_tokens(bench: Bench, soft_prompt: Prompt) -> None:
    async def stream(request: Request) -> list[TokenDelta]:
        return [delta async for delta in bench.engine.generate(request)]

    async def many() -> list[list[TokenDelta]]:
        requests = [bench.request(f"r{i}", soft_prompt, token_ids=(i + 1, 3)) for i in range(10)]
        return await asyncio.gather(*map(stream, requests))

    for i, deltas in enumerate(asyncio.run(many())):
        alone = submit(bench.engine, bench.request("alone", soft_prompt, token_ids=(i + 1, 3))).result(60)
        assert tuple(delta.token_id for delta in deltas) == alone.token_ids
        assert [delta.is_last for delta in deltas] == [False] * 7 + [True]
        assert deltas[-1].timings is not None


def test_leaving_the_stream_cancels_the_request(bench: Bench) -> None:
    async def leave_early() -> None:
        stream = bench.engine.generate(bench.request("left", max_new_tokens=300))
        async for _ in stream:
            break
        await stream.aclose()

    asyncio.run(leave_early())
    wait_until(lambda: bench.engine.stats().num_running == 0)
    assert len(bench.steps) < 300, "it ended before its time"


def test_collect_gives_the_same_deltas_at_once(bench: Bench, soft_prompt: Prompt) -> None:
    async def collected(request: Request) -> list[TokenDelta]:
        deltas: list[TokenDelta] = []
        await bench.engine.collect(request, deltas)
        return deltas

    deltas = asyncio.run(collected(bench.request("whole", soft_prompt)))
    alone = submit(bench.engine, bench.request("alone", soft_prompt)).result(60)
    assert tuple(delta.token_id for delta in deltas) == alone.token_ids
    assert [delta.is_last for delta in deltas] == [False] * 7 + [True]


def test_what_a_cancelled_request_has_by_then_is_collected(bench: Bench) -> None:
    deltas: list[TokenDelta] = []

    async def leave_early() -> None:
        request = bench.request("left", max_new_tokens=300)
        working = asyncio.ensure_future(bench.engine.collect(request, deltas))
        await asyncio.sleep(0)  # it is submitted
        await asyncio.to_thread(wait_until, lambda: sum(step.new_tokens for step in bench.steps) >= 5)
        working.cancel()
        await asyncio.wait([working])

    asyncio.run(leave_early())
    wait_until(lambda: bench.engine.stats().num_running == 0)
    assert 5 <= len(deltas) < 300
    assert not any(delta.is_last for delta in deltas)


# -- life and death ------------------------------------------------------------------------------


def test_drain_refuses_new_work_and_finishes_the_old(bench: Bench) -> None:
    running = submit(bench.engine, bench.request("running", max_new_tokens=100))
    assert bench.engine.drain(timeout=60)
    assert sum(step.new_tokens for step in bench.steps) >= 99, "a step is counted after its delivery"
    assert len(running.result(60).token_ids) == 100
    with pytest.raises(EngineStopped):
        submit(bench.engine, bench.request("new"))
    assert bench.engine.is_alive
    assert not bench.engine.is_accepting


def test_stopping_answers_what_runs(bench: Bench) -> None:
    running = submit(bench.engine, bench.request("running", max_new_tokens=300))
    bench.engine.stop()
    with pytest.raises(EngineStopped, match="send it again"):
        running.result(60)
    assert not bench.engine.is_alive


class FailingBackbone(DecoderOnly):
    """A device that breaks with its fifth forward pass, and stays broken. It waits at its gate."""

    calls = 0

    def __init__(self, model: PreTrainedModel, geometry: ModelGeometry) -> None:
        super().__init__(model, geometry)
        self.gate = threading.Event()

    def forward(
        self, embeds: Tensor, positions: Tensor, metadata: StepMetadata, source_embeds: Tensor | None = None
    ) -> Tensor:
        assert self.gate.wait(60)
        self.calls += 1
        if self.calls >= 5:
            raise RuntimeError("the device fell off the bus")
        return super().forward(embeds, positions, metadata)


def test_a_dead_engine_answers_everybody_and_says_so(bench: Bench, llama_backbone: DecoderOnly) -> None:
    failing = FailingBackbone(llama_backbone.model, llama_backbone.geometry)
    told: list[BaseException] = []
    engine = Engine(
        failing, bench.source, EngineConfig(max_rows=2, kv_cache_bytes=1 << 20), on_failure=told.append
    )
    engine.start()
    futures = submit_all(engine, [bench.request(f"r{i}", max_new_tokens=50) for i in range(5)])
    failing.gate.set()
    for future in futures:
        with pytest.raises(EngineStopped, match="the engine failed"):
            future.result(60)
    wait_until(lambda: told)
    assert isinstance(engine.failure, RuntimeError)
    assert not engine.is_alive
    with pytest.raises(EngineStopped):
        submit(engine, bench.request("too late"))
    engine.stop()


def test_step_statistics_count_every_token_once(
    llama_backbone: DecoderOnly, bench: Bench, soft_prompt: Prompt
) -> None:
    steps: list[StepStats] = []
    engine = Engine(llama_backbone, bench.source, EngineConfig(kv_cache_bytes=1 << 20), on_step=steps.append)
    engine.start()
    requests = [bench.request(f"r{i}", soft_prompt, token_ids=(1,) * (i + 1)) for i in range(6)]
    for future in [submit(engine, request) for request in requests]:
        future.result(60)
    engine.stop()
    assert sum(step.new_tokens for step in steps) == 6 * 8
    assert sum(step.num_prefill_tokens for step in steps) == 21
    assert sum(len(step.first_token_latencies) for step in steps) == 6
    assert sum(len(step.inter_token_latencies) for step in steps) == 6 * 7
