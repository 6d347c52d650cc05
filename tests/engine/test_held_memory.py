"""Bytes of Python's objects for a running and a waiting request, and none for one that ended.

They are counted by the interpreter's own tracing.
"""

import asyncio
import gc
import itertools
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager

import pytest

from app.engine.engine import Engine, EngineConfig
from app.engine.statistics import StepStats
from app.models.decoder_only import DecoderOnly
from app.request import Request, SamplingParams
from tests.waiting import PATIENCE, wait_until

ROWS, PROMPT, NEW = 32, 64, 64
PENALTY = SamplingParams(repetition_penalty=1.1)
BURST = 128  # requests that come at once
WARM = 12  # bursts, which fill what is bounded: 32 of each are held, of 256


class _NoPrompts:
    def load(self, digest: str) -> None:
        raise KeyError(digest)


class Paused:
    """An engine that stops after a step when it is ordered to, so that its objects can be counted."""

    def __init__(self, backbone: DecoderOnly) -> None:
        self.at_rest, self.go_on = threading.Event(), threading.Event()
        self.rests_when: Callable[[StepStats], bool] | None = None
        config = EngineConfig(max_rows=ROWS, token_budget=4096, kv_cache_bytes=16 << 20)
        self.engine = Engine(backbone, _NoPrompts(), config, on_step=self._on_step)  # type: ignore[arg-type]

    def _on_step(self, step: StepStats) -> None:
        if self.rests_when is not None and self.rests_when(step):
            self.rests_when = None
            self.at_rest.set()
            assert self.go_on.wait(PATIENCE)

    async def run(self, name: str, count: int, sampling: SamplingParams) -> None:
        async def one(number: int) -> None:
            ids = tuple(3 + (number + place) % 60 for place in range(PROMPT))
            request = Request(id=f"{name}-{number}", token_ids=ids, max_new_tokens=NEW, sampling=sampling)
            async for _ in self.engine.generate(request):
                pass

        await asyncio.gather(*map(one, range(count)))

    async def burst(self, name: str) -> None:
        """Run short requests: with and without penalties, of which something is held, and left early."""

        async def one(number: int) -> None:
            request = Request(
                id=f"{name}-{number}",
                token_ids=tuple(3 + (number + place) % 60 for place in range(8)),
                max_new_tokens=4,
                sampling=PENALTY if number % 2 else SamplingParams(),
                deadline=time.monotonic() + PATIENCE,
                is_held=number % 4 < 2,
            )
            async with aclosing(self.engine.generate(request)) as deltas:
                async for _ in deltas:
                    if number % 8 == 0:
                        break
            if number % 16 < 8:
                self.engine.release(request.id)

        await asyncio.gather(*map(one, range(BURST)))

    def bytes_each(self, name: str, count: int, sampling: SamplingParams) -> float:
        """Traced bytes of each of `count` requests, half of whose answers are there or which wait."""
        before = _traced()
        self.at_rest.clear()
        self.go_on.clear()
        self.rests_when = _after(NEW // 2, count)
        thread = threading.Thread(target=lambda: asyncio.run(self.run(name, count, sampling)))
        thread.start()
        assert self.at_rest.wait(PATIENCE)
        taken = _traced() - before
        self.go_on.set()
        thread.join()
        wait_until(lambda: not self.engine.stats().num_running)
        return taken / count


def _after(steps: int, count: int) -> Callable[[StepStats], bool]:
    seen: list[StepStats] = []

    def rests(step: StepStats) -> bool:
        if step.num_running + step.num_waiting >= count:
            seen.append(step)
        return len(seen) >= steps

    return rests


def _traced() -> int:
    gc.collect()
    sys._clear_type_cache()  # the interpreter's, of up to 4,096 names of attributes that were looked up
    return tracemalloc.get_traced_memory()[0]


@contextmanager
def traced() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


@pytest.fixture
def paused(llama_backbone: DecoderOnly) -> Iterator[Paused]:
    paused = Paused(llama_backbone)
    paused.engine.start()
    with traced():
        asyncio.run(paused.run("first", ROWS, PENALTY))
        yield paused
    paused.engine.stop()


def test_a_request_takes_kilobytes_beside_its_keys_and_values(paused: Paused) -> None:
    assert paused.bytes_each("greedy", ROWS, SamplingParams()) < 12_000
    assert paused.bytes_each("penalty", ROWS, PENALTY) < 24_000
    assert paused.bytes_each("waiting", 8 * ROWS, SamplingParams()) < 9_000


@pytest.mark.parametrize("bursts", [16, pytest.param(160, marks=pytest.mark.soak)])
def test_thousands_of_requests_leave_nothing(paused: Paused, bursts: int) -> None:
    """What is left grows with every round of requests; what a busy process takes once does not."""

    def floor_after(count: int) -> int:
        traced = []
        for _ in range(count):
            asyncio.run(paused.burst(str(next(numbers))))
            wait_until(lambda: not paused.engine.stats().num_running)
            traced.append(_traced())
        return min(traced[-4:])

    numbers = itertools.count()
    floors = [floor_after(WARM)]
    while len(floors) < 5:
        floors.append(floor_after(bursts))
        if floors[-1] - floors[-2] < 20 * bursts * BURST:
            return
    pytest.fail(f"each round of {bursts * BURST} requests left more: {floors}")
