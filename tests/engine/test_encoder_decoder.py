"""Encoder-decoders in the engine: mixed, crowded batches give what each request gives alone.

Sources exceed the token budget, blocks are so scarce that rows are preempted, and every slot that nothing was
written to is NaN.
"""

import random
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from app.engine.engine import Engine, EngineConfig
from app.engine.sequence import Sequence as Row
from app.engine.statistics import StepStats
from app.errors import (
    Cancelled,
    DeadlineExceeded,
    EngineStopped,
    InvalidRequest,
    PromptRejected,
    RequestFailed,
    RequestTooLong,
)
from app.models.attention import kv_cache
from app.models.attention.metadata import PackedItem
from app.prompt import Prompt
from app.request import Request, Segment, Source
from benchmarks.completions import Completion, submit, submit_all
from tests.engine.seq2seq import START, World, build_world
from tests.engine.test_exactness import difference
from tests.oracle import Expected
from tests.tiny_models import VOCABULARY
from tests.waiting import wait_until

BLOCK_SIZE, TOKEN_BUDGET = 4, 40
Asked = list[tuple[Request, Expected]]


@pytest.fixture(scope="module", params=["t5-gated", "bart"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = build_world(request.param, tmp_path_factory.mktemp(request.param))
    yield world
    world.source.close()


@pytest.fixture(scope="module")
def asked(world: World) -> Asked:
    """Three requests of each task, in random order."""
    rng = random.Random(7)
    tasks = [*world.tasks] * 3
    rng.shuffle(tasks)
    lengths = (1, 2, 7, 20, 45, 70)
    requests = [task.request(f"{i}", ids(rng, rng.choice(lengths))) for i, task in enumerate(tasks)]
    asked = [(each, world.expected(task, each)) for task, each in zip(tasks, requests, strict=True)]
    assert len({tuple(right.tokens) for _, right in asked}) > len(asked) * 0.6, "answers vary"
    return asked


def ids(rng: random.Random, length: int) -> tuple[int, ...]:
    return tuple(rng.randrange(3, VOCABULARY - 1) for _ in range(length))


@contextmanager
def engine_of(
    world: World,
    steps: list[StepStats] | None = None,
    *,
    num_blocks: int = 400,
    max_rows: int = 32,
    speculate: int = 0,
) -> Iterator[Engine]:
    """An engine whose memory is NaN at first, and which proves after each step that nothing is lost."""
    steps = [] if steps is None else steps

    def on_step(stats: StepStats) -> None:
        engine._scheduler.check_integrity()
        steps.append(stats)

    slot_bytes = sum(group.bytes_per_slot(world.backbone.dtype) for group in world.backbone.kv_groups)
    config = EngineConfig(
        max_rows=max_rows,
        token_budget=TOKEN_BUDGET,
        block_size=BLOCK_SIZE,
        kv_cache_bytes=slot_bytes * BLOCK_SIZE * num_blocks,
        speculate=speculate,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_cache, "_pool", nan_pool)
        engine = Engine(world.backbone, world.source, config, on_step=on_step)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def nan_pool(num_slots: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    pool = torch.full((num_slots, width), torch.nan, dtype=dtype, device=device)
    pool[kv_cache.PADDING_SLOT].zero_()
    return pool


def wrong(found: Sequence[Completion], asked: Asked) -> dict[str, str]:
    """What is wrong with each answer, by task and request."""
    pairs = zip(found, asked, strict=True)
    problems = {f"{request.task} {request.id}": difference(each, right) for each, (request, right) in pairs}
    return {name: problem for name, problem in problems.items() if problem}


@pytest.mark.parametrize(("max_rows", "num_blocks"), [(1, 45), (32, 45), (32, 400)])
def test_a_mixed_batch_equals_each_request_alone(
    world: World, asked: Asked, max_rows: int, num_blocks: int
) -> None:
    asked = asked[:10] if max_rows == 1 else asked
    steps: list[StepStats] = []
    with engine_of(world, steps, num_blocks=num_blocks, max_rows=max_rows) as engine:
        found = [each.result(120) for each in submit_all(engine, [request for request, _ in asked])]
    assert engine.failure is None
    assert not wrong(found, asked)
    assert max(step.num_encoder_tokens for step in steps) > TOKEN_BUDGET
    encoded = sum(step.num_encoder_tokens for step in steps)
    needed = sum(request.source.num_slots for request, _ in asked if request.source)
    if max_rows == 1 or num_blocks == 400:
        assert encoded == needed, "each source once"
    else:
        assert sum(step.num_preempted for step in steps)
        assert encoded > needed, "preempted rows encode again"
    if max_rows > 1:
        assert any(step.num_sources and step.num_decode_rows for step in steps), (
            "encoded beside decoding rows"
        )
        assert max(step.num_distinct_tasks for step in steps) >= 3
    assert engine.stats().num_sources == 0


def test_answers_with_guesses_are_the_same(world: World, asked: Asked) -> None:
    """Guesses are looked up in the source, too."""
    steps: list[StepStats] = []
    with engine_of(world, steps, num_blocks=45, max_rows=8, speculate=4) as engine:
        found = [each.result(120) for each in submit_all(engine, [request for request, _ in asked])]
    assert not wrong(found, asked)
    guessed = sum(step.num_speculated_tokens for step in steps)
    assert guessed > sum(step.num_accepted_tokens for step in steps) > 0


def test_samples_share_one_pass_of_the_encoder_and_a_prefix_is_written_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    write = world.backbone.write_prefix

    def count(prompt: Prompt, *rest: Any) -> None:
        written.append(prompt.digest)
        write(prompt, *rest)

    monkeypatch.setattr(world.backbone, "write_prefix", count)
    steps: list[StepStats] = []
    with engine_of(world, steps) as engine:
        for task in (world.task("peft-prefix"), world.task("soft-9"), world.task("decoder-soft")):
            request = task.request(f"{task.name}", ids(random.Random(3), 30))
            right = world.expected(task, request)
            before = len(steps)
            samples = [replace(request, id=f"{request.id}-{n}") for n in range(4)]
            answers = [each.result(60) for each in submit_all(engine, samples)]
            assert [difference(answer, right) for answer in answers] == [None] * 4
            wait_until(lambda: engine.stats().num_running == 0 == engine.stats().num_sources)
            assert request.source is not None
            assert sum(step.num_encoder_tokens for step in steps[before:]) == request.source.num_slots
            again = replace(request, id="again", source=replace(request.source, id="again"))
            assert difference(submit(engine, again).result(60), right) is None
    assert len(written) == 1
    rows = sum(step.num_prefix_tokens for step in steps)
    assert rows == 2 * 4, "a decoder's soft prompt runs once for each source"


def test_requests_share_a_source_by_what_it_holds(world: World) -> None:
    """An id that its caller uses twice never gives a request the source of another."""
    with engine_of(world) as engine:
        for task in (world.task("none"), world.task("decoder-soft")):
            requests = [task.request(f"{n}", ids(random.Random(n), 20)) for n in range(3)]
            right = [world.expected(task, each) for each in requests]
            same = [replace(each, source=replace(_source(each), id="one")) for each in requests]
            answers = [each.result(60) for each in submit_all(engine, same)]
            assert [difference(*pair) for pair in zip(answers, right, strict=True)] == [None] * 3


def _source(request: Request) -> Source:
    assert request.source is not None
    return request.source


def test_rows_and_their_sources_are_seen_by_a_watcher(world: World) -> None:
    with engine_of(world) as engine:
        engine.take_rows()
        submit(engine, world.task("soft-9").request("a", (5, 6, 7), max_new_tokens=1)).result(60)
        (row,) = wait_until(engine.take_rows) or ()
    assert (row.source_length, row.is_encoding) == (12, True)


# -- ends ----------------------------------------------------------------------------------------


class GatedSource:
    """Prompts come when the test says so."""

    def __init__(self, world: World) -> None:
        self._source = world.source
        self.pending: list[tuple[str, Future[Prompt]]] = []

    def load(self, digest: str) -> "Future[Prompt]":
        future: Future[Prompt] = Future()
        self.pending.append((digest, future))
        return future

    def close(self) -> None:
        return None


def test_whatever_ends_a_request_in_whatever_phase_frees_its_source(world: World) -> None:
    """Cancelled and late ones: while a prompt loads, in the queue, before and in the encoder, decoding."""
    gated = GatedSource(world)
    encoding, go_on = threading.Event(), threading.Event()

    def hold(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["inputs_embeds"].shape[1] == 61:
            encoding.set()
            assert go_on.wait(60)

    none = world.task("none")
    hook = world.backbone.model.get_encoder().register_forward_pre_hook(hold, with_kwargs=True)
    try:
        with engine_of(replace(world, source=gated), max_rows=3) as engine:  # type: ignore[type-var]
            loading = submit(engine, world.task("soft-9").request("loading", (5, 6)))
            wait_until(lambda: gated.pending)
            decoding = submit(engine, none.request("decoding", (5, 6), max_new_tokens=100))
            wait_until(lambda: engine.stats().num_running == 1)
            in_encoder = submit(engine, none.request("in encoder", (7,) * 61))
            before = submit(engine, none.request("before", (8,) * 62))
            assert encoding.wait(60)
            queued = [submit(engine, none.request(f"queued {n}", (8,) * 20)) for n in range(3)]
            for name in ("loading", "decoding", "in encoder", "before", *(f"queued {n}" for n in range(3))):
                engine.cancel(name)
            go_on.set()
            for future in (loading, decoding, in_encoder, before, *queued):
                with pytest.raises(Cancelled):
                    future.result(60)
            for length in (2, 61):
                late = none.request(f"late {length}", (9,) * length, max_new_tokens=100, deadline=0.0)
                with pytest.raises(DeadlineExceeded):
                    submit(engine, late).result(60)
            after = none.request("after", (5, 6, 7))
            assert difference(submit(engine, after).result(60), world.expected(none, after)) is None
            wait_until(lambda: engine.stats().kv_usage == 0 == engine.stats().num_sources)
    finally:
        hook.remove()


# -- failures ------------------------------------------------------------------------------------


POISON = 140


@contextmanager
def poisoned(world: World) -> Iterator[None]:
    """The model raises on every pass, of encoder or decoder, that takes POISON."""

    def check(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if bool((inputs[0] == POISON).any()):
            raise IndexError("index out of range in self")

    model = world.backbone.model
    embeddings = {model.get_encoder().get_input_embeddings(), model.get_decoder().get_input_embeddings()}
    handles = [module.register_forward_pre_hook(check) for module in embeddings]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def test_a_source_that_breaks_the_pass_ends_its_own_readers(world: World, asked: Asked) -> None:
    good = [pair for pair in asked if POISON not in (pair[0].source or Source(id="", token_ids=())).token_ids]
    good = [pair for pair in good if POISON not in pair[1].tokens][:12]
    bad = world.task("none").request("bad", (5, POISON, 7))
    with engine_of(world) as engine, poisoned(world):
        requests = [request for request, _ in good]
        futures = submit_all(engine, requests[:6])
        broken = submit_all(engine, [replace(bad, id=f"bad {n}") for n in range(3)])
        futures += submit_all(engine, requests[6:])
        for future in broken:
            with pytest.raises(RequestFailed, match="can't run this request"):
                future.result(60)
        assert not wrong([future.result(60) for future in futures], good)


@pytest.mark.parametrize("at_fault", [0, 1])
def test_a_reader_that_breaks_leaves_the_source_to_the_others(world: World, at_fault: int) -> None:
    """Whether or not it is the one that the source was encoded for; others have to wait for the next step."""
    task = world.task("none")
    request = task.request("shared", ids(random.Random(1), 70))  # with one token it fills a step
    request = replace(request, source=replace(request.source, token_ids=(5,) * 70))  # type: ignore[type-var]
    right = world.expected(task, request)
    samples = [replace(request, id=f"shared {n}") for n in range(3)]
    samples[at_fault] = replace(samples[at_fault], token_ids=(START, POISON))
    with engine_of(world) as engine, poisoned(world):
        futures = submit_all(engine, samples)
        with pytest.raises(RequestFailed):
            futures.pop(at_fault).result(60)
        assert [difference(future.result(60), right) for future in futures] == [None, None]


def test_a_device_that_is_gone_ends_the_engine(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token tried where a source failed would go through, if the model took any."""

    def fail(*_: Any) -> Tensor:
        raise RuntimeError("the device fell off the bus")

    monkeypatch.setattr(world.backbone, "forward", fail)
    requests = [task.request(task.name, (5, 6, 7)) for task in world.tasks]
    with engine_of(world) as engine:
        for future in submit_all(engine, requests):
            with pytest.raises(EngineStopped, match="the engine failed"):
                future.result(60)
        assert str(engine.failure) == "the device fell off the bus"


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"source": None}, InvalidRequest, "give its encoder a source"),
        ({"source": Source(id="s", token_ids=())}, InvalidRequest, "a source needs a token"),
        ({"source": Source(id="s", token_ids=(5, VOCABULARY))}, InvalidRequest, "0 to 210"),
        ({"source": Source(id="s", token_ids=(5,), prompt_digest="0" * 64)}, InvalidRequest, "come together"),
        ({"source": Source(id="s", token_ids=(5,) * 5000)}, RequestTooLong, "of the input = 5000"),
        ({"max_new_tokens": 1 << 21}, RequestTooLong, "positions"),
        ({"segments": (Segment(token_ids=(5,)),)}, InvalidRequest, "can't be kept"),
        (
            {"segments": (Segment(prompt_digest="0" * 64, num_cross_tokens=3, is_kept=False),)},
            InvalidRequest,
            "come first, and are kept",
        ),
        ({"source": Source(id="s", token_ids=(5,) * 150)}, RequestTooLong, "source 150"),
    ],
)
def test_impossible_requests_are_refused_at_once(
    world: World, settings: dict[str, Any], error: type[Exception], says: str
) -> None:
    request = replace(world.task("none").request("bad", (5, 6)), **settings)
    with engine_of(world, num_blocks=12) as engine, pytest.raises(error, match=says):
        engine.check_admissible(request)


def test_prompts_that_differ_from_their_manifest_at_any_place_are_refused(world: World) -> None:
    requests = []
    for name in ("soft-9", "peft-prefix", "cross", "decoder-soft"):
        request = world.task(name).request(name, (5, 6))
        assert request.source is not None
        if request.source.prompt_digest:
            requests.append(replace(request, source=replace(request.source, num_virtual_tokens=8)))
        for segment in request.segments:
            changes = [{"num_virtual_tokens": 3}]
            changes += [{"num_cross_tokens": 4}, {"num_encoder_tokens": 2}] * segment.is_kept
            requests += [replace(request, segments=(replace(segment, **each),)) for each in changes]
    with engine_of(world) as engine:
        for request in requests:
            with pytest.raises(PromptRejected, match="virtual tokens"):
                submit(engine, request).result(60)


# -- the comparison has teeth --------------------------------------------------------------------


def test_the_cross_slots_of_another_request_are_noticed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = world.task("none")
    requests = [task.request(str(n), ids(random.Random(n), 9)) for n in range(4)]
    asked = [(request, world.expected(task, request)) for request in requests]
    place, seen = Row.kv, []

    def mixed_up(row: Row, start: int, count: int) -> PackedItem:
        item = place(row, start, count)
        seen.append(row.cross_slots)
        own = len(item.slots) - len(row.cross_slots)
        return item._replace(slots=item.slots[:own] + seen[0])

    monkeypatch.setattr(Row, "kv", mixed_up)
    with engine_of(world) as engine:
        found = [future.result(60) for future in submit_all(engine, requests)]
    assert set(wrong(found, asked)) == {f"none {n}" for n in range(1, 4)}
