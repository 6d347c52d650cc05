"""A request that breaks the forward pass ends alone: its neighbours' tokens stay what they are."""

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from app.engine import isolation
from app.engine.engine import Engine, EngineConfig
from app.engine.plan import Plan
from app.engine.runner import LateInputs, Launched
from app.engine.statistics import StepStats
from app.errors import Cancelled, EngineStopped, PromptplexError, RequestFailed
from app.models.attention.metadata import StepMetadata
from app.models.decoder_only import DecoderOnly
from app.prompt import Prompt, VersionDraft
from app.request import Request, SamplingParams, TokenScore
from benchmarks.completions import submit, submit_all
from tests import oracle
from tests.engine.conftest import Bench
from tests.engine.test_engine import FailingBackbone, SlowSource, wait_until
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.usefixtures("steps_in_flight")

POISON = 140  # none of the answers below says it
NEIGHBOURS = [(i + 20, i + 60, 7) for i in range(15)]


@contextlib.contextmanager
def poisoned(backbone: DecoderOnly, token: int = POISON) -> Iterator[None]:
    """The model raises on every pass that takes `token`."""

    def check(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if bool((inputs[0] == token).any()):
            raise IndexError("index out of range in self")

    handle = backbone.model.get_input_embeddings().register_forward_pre_hook(check)
    try:
        yield
    finally:
        handle.remove()


def alone(bench: Bench, ids: tuple[int, ...], count: int = 8) -> tuple[int, ...]:
    return tuple(oracle.greedy(bench.base, list(ids), count).tokens)


def tokens_of(future: "Future[object]") -> tuple[int, ...]:
    return future.result(60).token_ids  # type: ignore[attr-defined]


def check_conserved(bench: Bench, engine: Engine | None = None) -> None:
    """At rest nothing is held but resident prefixes; an idle engine proves the rest itself, or dies."""
    engine = engine or bench.engine
    wait_until(lambda: engine.stats().num_running == 0)
    assert tokens_of(submit(engine, bench.request("after", token_ids=(50, 51)))) == alone(bench, (50, 51))
    wait_until(lambda: engine.stats().kv_usage == 0 or engine.stats().resident_prefixes)
    assert engine.is_accepting


def misfit(directory: Path, config: object, **shape: int) -> Prompt:
    """A prompt of another base, as if validation had let it through."""
    return oracle.as_prompt(oracle.tuned(tiny_model("llama", **shape), config, seed=3), directory)


BROKEN: dict[str, Callable[[Request], Request]] = {
    "token": lambda request: replace(request, token_ids=(5, POISON, 7)),
    "last token of a long prompt": lambda request: replace(request, token_ids=(5,) * 100 + (POISON,)),
    "resident text": lambda request: replace(request, segments=oracle.segments(text=(3, POISON, 4))),
    "seed": lambda request: replace(request, sampling=SamplingParams(do_sample=True, seed=None)),
    "bias": lambda request: replace(request, sampling=SamplingParams(logit_bias=((5, "much"),))),
    "penalty": lambda request: replace(request, sampling=SamplingParams(frequency_penalty="high")),
    "num_top": lambda request: replace(request, num_top=-1),
    "scores": lambda request: replace(request, num_scored=2, num_top=-1),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_request_that_breaks_the_pass_fails_alone_among_sixteen(bench: Bench, kind: str) -> None:
    good = [bench.request(f"r{i}", token_ids=ids) for i, ids in enumerate(NEIGHBOURS)]
    bad = BROKEN[kind](bench.request("bad"))
    with poisoned(bench.backbone):
        futures = [submit(bench.engine, request) for request in good[:8]]
        broken = submit(bench.engine, bad)
        futures += [submit(bench.engine, request) for request in good[8:]]
        with pytest.raises(RequestFailed):
            broken.result(60)
        assert [tokens_of(future) for future in futures] == [alone(bench, ids) for ids in NEIGHBOURS]
        with pytest.raises(RequestFailed):  # nor does it end the service where it runs alone
            submit(bench.engine, replace(bad, id="again")).result(60)
        check_conserved(bench)
    assert bench.engine.failure is None


def test_a_row_that_breaks_while_it_decodes_ends_after_what_it_said(bench: Bench) -> None:
    """Streams of the others neither lose a token nor get one twice."""
    wanted = {ids: alone(bench, ids, 30) for ids in NEIGHBOURS}
    victim = next(ids for ids in NEIGHBOURS if _own_tokens(wanted, ids))
    token = _own_tokens(wanted, victim)[0]

    async def stream(ids: tuple[int, ...]) -> tuple[list[int | None], PromptplexError | None]:
        said, error = [], None
        request = bench.request(str(ids), token_ids=ids, max_new_tokens=30)
        try:
            async for delta in bench.engine.generate(request):
                said.append(delta.token_id)
        except PromptplexError as raised:
            error = raised
        return said, error

    async def all_streams() -> list[tuple[list[int | None], PromptplexError | None]]:
        return await asyncio.gather(*map(stream, wanted))

    with poisoned(bench.backbone, token):
        answers = dict(zip(wanted, asyncio.run(all_streams()), strict=True))
        said, error = answers.pop(victim)
        assert isinstance(error, RequestFailed)
        assert tuple(said) == wanted[victim][: wanted[victim].index(token) + 1]
        assert answers == {ids: (list(wanted[ids]), None) for ids in answers}
        check_conserved(bench)


def _own_tokens(wanted: dict[tuple[int, ...], tuple[int, ...]], ids: tuple[int, ...]) -> list[int]:
    """What only this one says, in the middle of its answer."""
    others = {token for other, said in wanted.items() if other != ids for token in (*other, *said)}
    return [token for token in wanted[ids][3:20] if token not in others | {0, 50, 51}]


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (oracle.soft_config(6), {"hidden_size": 40}),
        (oracle.prefix_config(6), {"num_key_value_heads": 4}),
        (oracle.prefix_config(6), {"num_hidden_layers": 1}),
    ],
    ids=["soft prompt of another width", "prefix of other heads", "prefix of fewer layers"],
)
def test_a_prompt_that_breaks_ends_all_who_wait_for_it_and_nobody_else(
    bench: Bench, soft_prompt: Prompt, tmp_path: Path, config: object, shape: dict[str, int]
) -> None:
    bad = misfit(tmp_path / "bad", config, **shape)
    bench.store.publish("bad", VersionDraft(prompt=bad))
    expected = submit(bench.engine, bench.request("expected", soft_prompt)).result(60).token_ids
    good = [bench.request(f"r{i}", soft_prompt) for i in range(6)]
    broken = [submit(bench.engine, bench.request(f"bad{i}", bad, token_ids=(i + 1,) * 90)) for i in range(4)]
    futures = [submit(bench.engine, request) for request in good]
    for future in broken:
        with pytest.raises(RequestFailed, match="this task's prompt or leading text"):
            future.result(60)
    assert {tokens_of(future) for future in futures} == {expected}
    assert bench.engine.stats().resident_digests == {soft_prompt.digest}
    check_conserved(bench)


def test_a_prefix_that_failed_is_refused_for_a_while_at_no_cost(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = misfit(tmp_path / "bad", oracle.soft_config(6), hidden_size=40)
    bench.store.publish("bad", VersionDraft(prompt=bad))
    with pytest.raises(RequestFailed):
        submit(bench.engine, bench.request("first", bad)).result(60)
    counts = []
    for number in range(20):  # with the first answer, what failed before is counted
        with pytest.raises(RequestFailed, match="refused for 30 seconds"):
            submit(bench.engine, bench.request(f"next{number}", bad)).result(60)
        counts.append(len(bench.steps))
    assert counts == counts[:1] * 20
    other_text = bench.request("other", bad, (4, 4))  # it stands on the same one
    monkeypatch.setattr(isolation, "REFUSAL_SECONDS", 0.0)
    with pytest.raises(RequestFailed):
        submit(bench.engine, other_text).result(60)
    with poisoned(bench.backbone), pytest.raises(RequestFailed):
        submit(bench.engine, bench.request("text", text=(POISON,))).result(60)
    mended = submit(bench.engine, bench.request("text", text=(POISON,))).result(60)
    assert mended.token_ids == alone(bench, (POISON, 5, 6, 7)), "tried again after a while"


def test_a_prefix_that_fails_after_its_only_request_left_is_not_kept(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request is cancelled while the step that builds its prefix runs: that is known before it fails."""
    building, gate = threading.Event(), threading.Event()
    embed = bench.backbone.embed

    def hold(token_ids: Tensor) -> Tensor:
        if (token_ids == POISON).any() and not gate.is_set():
            building.set()
            assert gate.wait(60)
        return embed(token_ids)

    def leave(_: StepStats) -> None:  # after a step, while the next one runs
        if not gate.is_set() and engine.stats().num_running == 2:
            assert building.wait(60)
            engine.cancel("left")
            gate.set()
        elif not gate.is_set():
            time.sleep(0.05)  # the other one lasts until this one is here

    monkeypatch.setattr(bench.backbone, "embed", hold)
    engine = Engine(bench.backbone, bench.source, EngineConfig(kv_cache_bytes=1 << 20), on_step=leave)
    engine.start()
    other = submit(engine, bench.request("other", max_new_tokens=300))
    wait_until(lambda: engine.stats().steps)
    with poisoned(bench.backbone):
        left = submit(engine, bench.request("left", text=(3, POISON, 4)))
        with pytest.raises(Cancelled):
            left.result(60)
        assert len(other.result(60).token_ids) == 300
        check_conserved(bench, engine)
    assert engine.stats().resident_prefixes == 0
    engine.stop()


def test_several_at_fault_are_all_found(bench: Bench) -> None:
    with poisoned(bench.backbone):
        broken = [submit(bench.engine, bench.request(f"bad{i}", token_ids=(POISON, i))) for i in range(5)]
        futures = [submit(bench.engine, bench.request(str(ids), token_ids=ids)) for ids in NEIGHBOURS]
        for future in broken:
            with pytest.raises(RequestFailed):
                future.result(60)
        assert [tokens_of(future) for future in futures] == [alone(bench, ids) for ids in NEIGHBOURS]
        check_conserved(bench)


def test_a_failure_in_a_full_memory_conserves_it(bench: Bench, llama_backbone: DecoderOnly) -> None:
    """Preemption, eviction and failures in one: everybody else gets the right answer in the end."""
    slot = sum(group.bytes_per_slot(llama_backbone.dtype) for group in llama_backbone.kv_groups)
    config = EngineConfig(max_rows=8, token_budget=24, kv_cache_bytes=slot * 16 * 14)
    engine = Engine(llama_backbone, bench.source, config)
    engine.start()
    with poisoned(bench.backbone):
        asked = []
        for i, ids in enumerate(NEIGHBOURS):
            resident = (POISON,) * 9 if i % 5 == 4 else (2,) * (i % 3)
            request = bench.request(str(i), token_ids=ids, text=resident, max_new_tokens=40)
            asked.append((request, submit(engine, request)))
        for request, future in asked:
            if POISON in request.prompt_ids:
                with pytest.raises(RequestFailed):
                    future.result(60)
            else:
                assert tokens_of(future) == alone(bench, request.prompt_ids, 40)
        check_conserved(bench, engine)
    engine.stop()


class TransientBackbone(DecoderOnly):
    """A device that fails once, in a step of several rows; no request is at fault."""

    has_failed = False

    def forward(
        self, embeds: Tensor, positions: Tensor, metadata: StepMetadata, source_embeds: Tensor | None = None
    ) -> Tensor:
        if not self.has_failed and len(metadata.logit_rows) > 1:
            self.has_failed = True
            raise RuntimeError("out of memory for so many at once")
        return super().forward(embeds, positions, metadata)


def test_a_step_whose_parts_all_run_costs_nobody_anything(bench: Bench, llama_backbone: DecoderOnly) -> None:
    backbone = TransientBackbone(llama_backbone.model, llama_backbone.geometry)
    engine = Engine(backbone, bench.source, EngineConfig(kv_cache_bytes=1 << 20))
    futures = []
    engine.start()
    for ids in NEIGHBOURS:
        futures.append(submit(engine, bench.request(str(ids), token_ids=ids, max_new_tokens=20)))
    assert [tokens_of(future) for future in futures] == [alone(bench, ids, 20) for ids in NEIGHBOURS]
    assert backbone.has_failed
    check_conserved(bench, engine)
    engine.stop()


def test_an_error_that_comes_with_a_result_costs_nobody_anything(
    bench: Bench, llama_backbone: DecoderOnly
) -> None:
    """As on a GPU, where a launch is no more than that: every seventh result is an error."""
    engine = Engine(llama_backbone, bench.source, EngineConfig(kv_cache_bytes=1 << 20))
    runner, numbers = engine._executor._runner, itertools.count(1)
    run = runner.run

    def failing() -> dict[int, tuple[TokenScore, ...]]:
        raise RuntimeError("an illegal memory access")

    def run_and_fail_later(plan: Plan, late: LateInputs) -> Launched:
        launched = run(plan, late)
        return launched if next(numbers) % 7 else replace(launched, scores=failing)

    runner.run = run_and_fail_later  # type: ignore[method-assign]
    engine.start()
    requests = [bench.request(str(ids), token_ids=ids, max_new_tokens=20) for ids in NEIGHBOURS]
    answers = [tokens_of(future) for future in submit_all(engine, requests)]
    assert answers == [alone(bench, ids, 20) for ids in NEIGHBOURS]
    engine.stop()


class NumbedBackbone(FailingBackbone):
    """A device that breaks, and takes further work in silence: its numbers mean nothing."""

    def forward(
        self, embeds: Tensor, positions: Tensor, metadata: StepMetadata, source_embeds: Tensor | None = None
    ) -> Tensor:
        if self.calls < 5 or len(embeds) > 1:
            return super().forward(embeds, positions, metadata)
        return torch.full((len(metadata.logit_rows), self.geometry.vocab_size), float("nan"))


@pytest.mark.parametrize("device", [FailingBackbone, NumbedBackbone])
@pytest.mark.parametrize("num_rows", [1, 2, 7])
def test_what_cannot_be_told_apart_ends_the_engine(
    bench: Bench, llama_backbone: DecoderOnly, device: type[FailingBackbone], num_rows: int
) -> None:
    """As an asynchronous error of a device does: it comes with every call from then on."""
    ends: list[BaseException] = []
    backbone = device(llama_backbone.model, llama_backbone.geometry)
    backbone.calls = 4
    engine = Engine(backbone, bench.source, EngineConfig(kv_cache_bytes=1 << 20), on_failure=ends.append)
    engine.start()
    futures = submit_all(engine, [bench.request(f"r{i}", max_new_tokens=50) for i in range(num_rows)])
    backbone.gate.set()
    for future in futures:
        with pytest.raises(EngineStopped, match="the engine failed"):
            future.result(60)
    wait_until(lambda: ends)
    assert str(engine.failure) == "the device fell off the bus"
    engine.stop()


class BrokenSource(SlowSource):
    """A source that raises instead of returning a future."""

    def load(self, digest: str) -> "Future[Prompt]":
        raise RuntimeError("can't start new thread")


def test_an_unforeseen_failure_of_a_load_is_its_own_requests_matter(
    bench: Bench, soft_prompt: Prompt, llama_backbone: DecoderOnly
) -> None:
    slow = SlowSource()
    for source in (slow, BrokenSource()):
        engine = Engine(llama_backbone, source, EngineConfig(kv_cache_bytes=1 << 20))
        engine.start()
        lost = submit(engine, bench.request("lost", soft_prompt))
        if source is slow:
            wait_until(lambda: slow.pending)
            slow.pending[0].set_exception(MemoryError())
        with pytest.raises(RequestFailed, match="could not be loaded"):
            lost.result(60)
        check_conserved(bench, engine)
        engine.stop()
