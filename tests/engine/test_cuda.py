"""On a GPU: decode steps wait for nothing, and their graphs choose what eager steps choose."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from app.engine.graphs.capture import CudaCapture
from app.engine.plan import Plan
from app.engine.runner import Launched, Runner
from app.models.attention.kv_cache import KVCache
from app.models.decoder_only import DecoderOnly
from app.request import SamplingParams
from tests.engine.test_recording import NUM_SLOTS, Rows
from tests.tiny_models import packed_backbone, tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")

NUM_STEPS = 3


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(scope="module")
def backbone() -> DecoderOnly:
    return packed_backbone(tiny_model("gemma2").to("cuda"))  # two groups, one of them with a window


def new_runner(backbone: DecoderOnly) -> Runner:
    num_slots = [NUM_SLOTS] * len(backbone.kv_groups)
    return Runner(
        backbone, KVCache(backbone.kv_groups, num_slots, dtype=backbone.dtype, device=backbone.device)
    )


def answers(runner: Runner, rows: Rows) -> list[list[int]]:
    """What rows say, where no result is read before all steps are launched."""
    plans = [rows.prompts(3), *(rows.follow() for _ in range(2 * NUM_STEPS))]
    launched = [run(runner, plan) for plan in plans[:-NUM_STEPS]]  # kernels are compiled, workspaces taken
    with no_waiting():
        launched += [run(runner, plan) for plan in plans[-NUM_STEPS:]]
    results = [each.result() for each in launched]
    return [[result.tokens[row][0].token_id for row in range(rows.count)] for result in results]


def run(runner: Runner, plan: Plan) -> Launched:
    return runner.run(plan, dict)


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(do_sample=True, top_k=20, seed=3)])
def test_steps_wait_for_nothing_and_graphs_choose_the_same(
    backbone: DecoderOnly, params: SamplingParams
) -> None:
    eager, recorded, lines = new_runner(backbone), new_runner(backbone), list[str]()
    recorded.record_graphs(max_rows=6, capture=CudaCapture(backbone.device), progress=lines.append)
    assert recorded._graphs is not None, lines
    assert recorded._graphs.sizes == [1, 2, 4, 6]
    for count in (1, 3, 5):
        expected = answers(eager, Rows(count, params, num_groups=2))
        assert answers(recorded, Rows(count, params, num_groups=2)) == expected
