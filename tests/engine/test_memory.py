"""What a server's memory comes to: 20,000 short requests of all lengths on the demo base, in bf16.

    python -m pytest -m soak tests/engine/test_memory.py

prints the figures of docs/deployment.md, "Memory".
"""

import random
import resource
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest

from app.engine.engine import Engine, EngineConfig
from app.models.loading import load_base
from app.prompt import Prompt
from app.request import Request
from benchmarks.completions import submit

MODEL = Path(__file__).parent.parent.parent / "demo" / "demo-causal"
NUM_REQUESTS = 20_000
NUM_EVERY = 2_000


class NoPrompts:
    """Only the base is asked here."""

    def load(self, digest: str) -> "Future[Prompt]":
        raise NotImplementedError


def resident_megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


@pytest.mark.soak
def test_memory_is_level_after_the_first_requests(capsys: pytest.CaptureFixture[str]) -> None:
    base = load_base(str(MODEL), dtype="bfloat16", device="cpu")
    engine = Engine(base.backbone, NoPrompts(), EngineConfig(kv_cache_bytes=64 << 20))
    engine.start()
    levels = [resident_megabytes()]
    for number in range(0, NUM_REQUESTS, NUM_EVERY):
        serve(engine, number, base.backbone.geometry.vocab_size)
        levels.append(resident_megabytes())
    engine.stop()
    with capsys.disabled():
        sys.stdout.write(
            f"\nMB at the start, and after every {NUM_EVERY} requests: {[*map(round, levels)]}\n"
        )
    assert levels[-1] - levels[2] < 60, "it grows no more after 4,000 requests"
    assert levels[-1] - levels[0] < 300, "it was 632 when every number of rows had its own products"


def serve(engine: Engine, begin: int, vocabulary: int) -> None:
    """Requests in groups of 1 to 100, so that steps have all numbers of tokens."""
    draw = random.Random(begin)
    pending: list[Future[object]] = []
    for number in range(begin, begin + NUM_EVERY):
        ids = tuple(draw.randrange(vocabulary) for _ in range(draw.randrange(1, 180)))
        request = Request(id=str(number), token_ids=ids, max_new_tokens=draw.randrange(1, 5))
        pending.append(submit(engine, request))  # type: ignore[arg-type]
        if len(pending) >= draw.randrange(1, 100):
            for future in pending:
                future.result(120)
            pending.clear()
    for future in pending:
        future.result(120)
