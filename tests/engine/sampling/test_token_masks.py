"""Constrained rows in the running engine, with a language of grammars that is small enough to check by eye.

A grammar names, step by step, the ids that may come: "3 4; 5; 6 7". A step that begins with `?` isn't known
before the gate opens. `!` fails there, `!!` panics as native code does, `!!!` says why, and an empty step
leaves nothing.
"""

import gc
import logging
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from app.engine import engine as engines
from app.engine.engine import Engine, EngineConfig
from app.engine.sampling import token_masks
from app.engine.sampling.token_masks import NUM_WORKERS, PackedMask
from app.engine.statistics import StepStats
from app.errors import Cancelled, ConstraintFailed, DeadlineExceeded, InvalidRequest
from app.models.decoder_only import DecoderOnly
from app.prompt import Prompt
from app.request import FinishReason, Request, SamplingParams
from benchmarks.completions import submit
from tests.engine.conftest import Bench
from tests.tiny_models import VOCABULARY
from tests.waiting import wait_until

END = 0


class Panic(BaseException):
    """What pyo3 raises where Rust panics is no Exception."""


@dataclass(eq=False)
class Steps:
    """One row's way through such a grammar; notes what it is given, and by whom."""

    steps: list[str]
    accepted: list[int] = field(default_factory=list)
    threads: set[str] = field(default_factory=set)
    busy: threading.Lock = field(default_factory=threading.Lock)
    gate: threading.Event = field(default_factory=threading.Event)

    def mask(self) -> PackedMask:
        with self._alone():
            step = self.steps[len(self.accepted)] if len(self.accepted) < len(self.steps) else str(END)
            if step.startswith("?"):
                assert self.gate.wait(60)
            if step == "!!!":
                raise ConstraintFailed("this grammar knows why")
            if step == "!!":
                raise Panic
            if step == "!":
                raise RuntimeError("this grammar fails here")
            packed = np.zeros(-(-VOCABULARY // 32), dtype=np.uint32)
            for id_ in map(int, step.lstrip("?").split()):
                packed[id_ // 32] |= np.uint32(1 << id_ % 32)
            return packed

    def accept(self, token_id: int) -> None:
        with self._alone():
            self.accepted.append(token_id)

    def _alone(self) -> threading.Lock:
        assert not self.busy.locked(), "one thread at a time"
        self.threads.add(threading.current_thread().name)
        return self.busy


class StepGrammars:
    """Starts rows, and knows which of them still live."""

    def __init__(self) -> None:
        self.started: weakref.WeakSet[Steps] = weakref.WeakSet()
        self.threads: set[str] = set()
        self.gate = threading.Event()
        self.num_started = 0

    def start(self, grammar: str) -> Steps:
        if grammar == "never starts":
            raise Panic
        row = Steps([step.strip() for step in grammar.split(";")], threads=self.threads, gate=self.gate)
        self.num_started += 1
        self.started.add(row)
        return row


@pytest.fixture
def grammars() -> StepGrammars:
    return StepGrammars()


@pytest.fixture
def engine(bench: Bench, grammars: StepGrammars) -> Iterator[Engine]:
    speculate = 4 if engines.steps_in_flight_on(bench.backbone.device) == 1 else 0  # rows go ahead, or guess
    config = EngineConfig(max_rows=48, token_budget=256, kv_cache_bytes=8 << 20, speculate=speculate)
    engine = Engine(bench.backbone, bench.source, config, grammars=grammars, on_step=bench.steps.append)
    engine.start()
    yield engine
    grammars.gate.set()
    engine.stop()


def constrained(bench: Bench, name: str, grammar: str, **settings: object) -> Request:
    return bench.request(name, grammar=grammar, stop_ids=frozenset({END}), **settings)


def random_steps(seed: int, length: int, width: int) -> list[set[int]]:
    draw = np.random.default_rng(seed)
    return [set(draw.choice(np.arange(1, VOCABULARY), width, replace=False).tolist()) for _ in range(length)]


def written(steps: list[set[int]]) -> str:
    return ";".join(" ".join(map(str, sorted(step))) for step in steps)


@pytest.mark.usefixtures("steps_in_flight")
def test_rows_stay_within_their_grammars_and_neighbours_dont_notice(
    bench: Bench, engine: Engine, soft_prompt: Prompt
) -> None:
    sampled = SamplingParams(do_sample=True, temperature=1.5, top_k=20, repetition_penalty=1.2, seed=3)
    free = [
        bench.request(
            f"free{i}",
            soft_prompt if i % 2 else None,
            sampling=sampled if i % 3 else SamplingParams(),
            token_ids=(3, 4, 5 + i),
            max_new_tokens=40,
        )
        for i in range(12)
    ]
    alone = [submit(engine, request).result(60) for request in free]
    grammars = [random_steps(seed, 4 + 3 * seed, 1 + seed) for seed in range(12)]
    bound = [
        constrained(
            bench,
            f"bound{i}",
            written(steps),
            max_new_tokens=100,
            token_ids=(9, 8 + i),
            sampling=replace(sampled, seed=i) if i % 2 else SamplingParams(),
        )
        for i, steps in enumerate(grammars)
    ]
    futures = [submit(engine, request) for pair in zip(free, bound, strict=True) for request in pair]
    found = [future.result(60) for future in futures]
    assert [each.token_ids for each in found[::2]] == [each.token_ids for each in alone]
    for steps, completion in zip(grammars, found[1::2], strict=True):
        *tokens, last = completion.token_ids
        assert last == END
        assert completion.finish is FinishReason.EOS
        assert len(tokens) == len(steps)
        assert all(token in step for token, step in zip(tokens, steps, strict=True))
    assert max(step.num_running for step in bench.steps) > 12


def test_reported_log_probabilities_are_the_models_own(bench: Bench, engine: Engine) -> None:
    """Greedy takes the most probable of what is allowed; what is reported knows nothing of the mask."""
    steps = random_steps(7, 12, 5)
    found = submit(engine, constrained(bench, "bound", written(steps), max_new_tokens=50)).result(60)
    ids = torch.tensor([[5, 6, 7, *found.token_ids]])
    logprobs = bench.base(ids).logits[0].log_softmax(-1)[2:-1]
    for row, token, logprob, allowed in zip(
        logprobs, found.token_ids, found.logprobs, [*steps, {END}], strict=True
    ):
        assert token == max(allowed, key=lambda id_: row[id_].item())
        assert logprob == pytest.approx(row[token].item(), abs=1e-4)


def test_a_constrained_sample_is_drawn_from_what_is_allowed(bench: Bench, engine: Engine) -> None:
    logits = bench.base(torch.tensor([[5, 6, 7]])).logits[0, -1]
    allowed = sorted(random_steps(1, 1, 6)[0])
    weights = (logits[allowed].double() / 2).softmax(-1).numpy() * 600
    requests = [
        constrained(
            bench,
            f"r{seed}",
            written([set(allowed)]),
            max_new_tokens=1,
            sampling=SamplingParams(do_sample=True, temperature=2.0, seed=seed),
        )
        for seed in range(600)
    ]
    tokens = [future.result(60).token_ids[0] for future in [submit(engine, each) for each in requests]]
    observed = np.array([tokens.count(id_) for id_ in allowed])
    assert observed.sum() == 600
    assert float(((observed - weights) ** 2 / weights).sum()) < 20.5, "chi-square, 5 degrees, 0.999"


def test_the_work_is_done_on_workers(bench: Bench, engine: Engine, grammars: StepGrammars) -> None:
    futures = [
        submit(engine, constrained(bench, f"r{i}", written(random_steps(i, 30, 3)), max_new_tokens=40))
        for i in range(8)
    ]
    assert all(future.result(60).finish is FinishReason.EOS for future in futures)
    assert {name.split("_")[0] for name in grammars.threads} == {"grammar"}


@pytest.mark.usefixtures("steps_in_flight")
def test_preempted_rows_go_on_where_they_were(
    bench: Bench, llama_backbone: DecoderOnly, grammars: StepGrammars, tmp_path: Path
) -> None:
    slot = sum(group.bytes_per_slot(llama_backbone.dtype) for group in llama_backbone.kv_groups)
    few: list[StepStats] = []
    config = EngineConfig(max_rows=12, token_budget=48, block_size=4, kv_cache_bytes=slot * 4 * 40)
    scarce = Engine(llama_backbone, bench.source, config, grammars=grammars, on_step=few.append)
    scarce.start()
    steps = [random_steps(seed, 60, 4) for seed in range(12)]
    sampling = SamplingParams(do_sample=True, seed=5)
    requests = [
        constrained(bench, f"r{i}", written(each), max_new_tokens=70, sampling=sampling)
        for i, each in enumerate(steps)
    ]
    plain = [bench.request(f"p{i}", token_ids=(i + 1,), max_new_tokens=60) for i in range(4)]
    try:
        alone = [submit(scarce, request).result(60).token_ids for request in (*requests, *plain)]
        assert not sum(step.num_preempted for step in few)
        crowd = [submit(scarce, request) for request in (*requests, *plain)]
        assert [future.result(60).token_ids for future in crowd] == alone
        assert sum(step.num_preempted for step in few) > 5
    finally:
        scarce.stop()
    for each, tokens in zip(steps, alone, strict=False):
        assert all(token in step for token, step in zip(tokens, each, strict=False))


@pytest.mark.usefixtures("steps_in_flight")
@pytest.mark.parametrize("grammar", ["never starts", "!", "!!", "!!!", "3;4;!", "3;4;!!", "", "3 4;;5"])
def test_a_grammar_that_errs_fails_its_own_row_alone(bench: Bench, engine: Engine, grammar: str) -> None:
    good = [constrained(bench, f"g{i}", "1 2;3 4;5 6;7 8", max_new_tokens=9) for i in range(6)]
    good += [bench.request(f"f{i}", token_ids=(i + 1, 2), max_new_tokens=30) for i in range(6)]
    clean = [submit(engine, request).result(60).token_ids for request in good]
    futures = [submit(engine, request) for request in good[:5]]
    bad = submit(engine, constrained(bench, "bad", grammar, max_new_tokens=30))
    futures += [submit(engine, request) for request in good[5:]]
    with pytest.raises(ConstraintFailed, match=r"can't be followed|knows why|no token may come"):
        bad.result(60)
    assert [future.result(60).token_ids for future in futures] == clean
    assert engine.is_alive


@pytest.mark.parametrize(("step", "num_logged"), [("!", 1), ("!!", 1), ("!!!", 0), ("", 0)])
def test_only_what_nobody_foresaw_is_logged_and_once(
    bench: Bench, engine: Engine, caplog: pytest.LogCaptureFixture, step: str, num_logged: int
) -> None:
    with caplog.at_level(logging.DEBUG, "promptplex.engine"), pytest.raises(ConstraintFailed):
        submit(engine, constrained(bench, "bad", f"3;4;{step}", max_new_tokens=30)).result(60)
    logged = [record for record in caplog.records if record.name == "promptplex.engine"]
    assert len(logged) == num_logged
    assert all(record.exc_info for record in logged)


SLOW = ["?1 2 3;4 5 6;7 8 9", "1 2 3;?4 5 6;?7 8 9;1 2", f"1 2 3;4 5 6;7 8 9;?{END}"]
SAMPLED = SamplingParams(do_sample=True, seed=8, repetition_penalty=1.3, frequency_penalty=0.4)


@pytest.mark.usefixtures("steps_in_flight")
@pytest.mark.parametrize("sampling", [SamplingParams(), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("grammar", SLOW, ids=["first", "middle", "last"])
def test_a_late_mask_holds_up_its_own_row_alone(
    bench: Bench,
    engine: Engine,
    grammars: StepGrammars,
    soft_prompt: Prompt,
    grammar: str,
    sampling: SamplingParams,
) -> None:
    """Neighbours end while the gate is shut, and the late row's answer is what it is in time."""
    slow = constrained(
        bench,
        "slow",
        grammar,
        prompt=soft_prompt,
        token_ids=tuple(range(1, 30)),
        max_new_tokens=9,
        num_top=3,
        sampling=sampling,
    )
    free = [
        bench.request(f"f{i}", token_ids=(i + 1, 2), max_new_tokens=30, sampling=sampling) for i in range(6)
    ]
    grammars.gate.set()
    in_time = submit(engine, slow).result(60)
    alone = [submit(engine, request).result(60).token_ids for request in free]
    grammars.gate.clear()
    late = submit(engine, slow)
    neighbours = [submit(engine, request) for request in free]
    assert [neighbour.result(60).token_ids for neighbour in neighbours] == alone
    assert not late.done()
    grammars.gate.set()
    found = late.result(60)
    assert (found.token_ids, found.finish) == (in_time.token_ids, FinishReason.EOS)
    assert found.logprobs == pytest.approx(in_time.logprobs, abs=1e-4)


@pytest.mark.parametrize("grammar", ["?1 2;3", "1 2;?3"])
def test_a_row_whose_mask_never_comes_still_hears_of_its_end(
    bench: Bench, engine: Engine, grammars: StepGrammars, grammar: str
) -> None:
    """Its deadline, its cancellation: neither waits for the grammar."""
    late = submit(engine, constrained(bench, "late", grammar, deadline=time.monotonic() + 0.3))
    with pytest.raises(DeadlineExceeded):
        late.result(60)
    left = submit(engine, constrained(bench, "left", grammar))
    wait_until(lambda: grammars.num_started == 2)
    engine.cancel("left")
    with pytest.raises(Cancelled):
        left.result(60)
    assert not grammars.gate.is_set()


@pytest.mark.usefixtures("steps_in_flight")
def test_late_rows_are_preempted_like_others(
    bench: Bench, llama_backbone: DecoderOnly, grammars: StepGrammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_masks, "MASK_SECONDS", 0.002)  # each step waits so long
    slot = sum(group.bytes_per_slot(llama_backbone.dtype) for group in llama_backbone.kv_groups)
    few: list[StepStats] = []
    config = EngineConfig(max_rows=12, token_budget=48, block_size=4, kv_cache_bytes=slot * 4 * 40)
    scarce = Engine(llama_backbone, bench.source, config, grammars=grammars, on_step=few.append)
    scarce.start()
    steps = written(random_steps(1, 5, 4))
    bound = [constrained(bench, f"b{i}", f"{steps};?5 6;7 8", max_new_tokens=20) for i in range(3)]
    free = [bench.request(f"p{i}", token_ids=(i + 1,), max_new_tokens=60) for i in range(9)]
    try:
        grammars.gate.set()
        requests = [request for trio in zip(free[::3], bound, free[1::3], strict=True) for request in trio]
        requests += free[2::3]
        alone = [submit(scarce, request).result(60).token_ids for request in requests]
        grammars.gate.clear()
        futures = [submit(scarce, request) for request in requests]
        in_crowd = [
            future.result(60)
            for future, request in zip(futures, requests, strict=True)
            if not request.grammar
        ]
        assert sum(step.num_preempted for step in few) > 3
        assert len(in_crowd) == 9
        grammars.gate.set()
        assert [future.result(60).token_ids for future in futures] == alone
    finally:
        grammars.gate.set()
        scarce.stop()


def test_work_for_rows_that_ended_is_not_done(bench: Bench, engine: Engine, grammars: StepGrammars) -> None:
    busy = [submit(engine, constrained(bench, f"busy{i}", "?1;2")) for i in range(NUM_WORKERS)]
    wait_until(lambda: grammars.num_started == NUM_WORKERS)
    queued = [submit(engine, constrained(bench, f"queued{i}", "1;2")) for i in range(5)]
    wait_until(lambda: any(step.num_running == NUM_WORKERS + 5 for step in bench.steps))
    for i in range(5):
        engine.cancel(f"queued{i}")
    for future in queued:
        with pytest.raises(Cancelled):
            future.result(60)
    grammars.gate.set()
    assert all(future.result(60).token_ids == (1, 2, END) for future in busy)
    assert grammars.num_started == NUM_WORKERS


def test_a_length_ends_a_grammar_early(bench: Bench, engine: Engine) -> None:
    found = submit(engine, constrained(bench, "short", "1;2;3;4;5;6", max_new_tokens=3)).result(60)
    assert (found.token_ids, found.finish) == ((1, 2, 3), FinishReason.LENGTH)


def test_what_ends_leaves_nothing_behind(bench: Bench, engine: Engine, grammars: StepGrammars) -> None:
    long = written([{1, 2, 3}] * 250)
    futures = [submit(engine, constrained(bench, f"r{i}", long, max_new_tokens=260)) for i in range(6)]
    # Workers begin the grammars, a few at a time; a step may run before they have.
    wait_until(lambda: len(grammars.started) == 6 and any(step.num_running == 6 for step in bench.steps))
    for i in range(5):
        engine.cancel(f"r{i}")
    for future in futures[:5]:
        with pytest.raises(Cancelled):
            future.result(60)
    assert len(futures[5].result(60).token_ids) == 251
    del futures, future
    wait_until(lambda: gc.collect() >= 0 and not grammars.started)
    assert not grammars.started


def test_an_engine_without_grammars_refuses(bench: Bench) -> None:
    with pytest.raises(InvalidRequest, match="can't constrain"):
        submit(bench.engine, constrained(bench, "r", "1"))


def test_a_bias_outside_the_vocabulary_is_refused(bench: Bench) -> None:
    for id_ in (-1, VOCABULARY):
        with pytest.raises(InvalidRequest, match="token ids must be from 0"):
            submit(bench.engine, bench.request("r", sampling=SamplingParams(logit_bias=((id_, 1.0),))))
