"""Graphs are recorded where they can be; where not, steps run eagerly, and the operator reads why."""

from dataclasses import dataclass, field
from itertools import count

import numpy as np
import pytest
import torch

from app.engine.graphs.capture import Repetition, Work
from app.engine.plan import Plan, PlanItem
from app.engine.runner import Runner
from app.engine.sampling.state import SamplingState
from app.models.attention.kv_cache import KVCache
from app.models.attention.metadata import PackedItem
from app.models.decoder_only import DecoderOnly
from app.request import SamplingParams
from tests.engine.padded_backend import use_padded_backends
from tests.tiny_models import packed_backbone, tiny_model

NUM_SLOTS, ROW_SLOTS = 400, 32


@pytest.fixture
def backbone() -> DecoderOnly:
    backbone = packed_backbone(tiny_model("llama"))
    use_padded_backends(backbone)
    return backbone


def new_runner(backbone: DecoderOnly, capture: object = None, max_rows: int = 6) -> tuple[Runner, list[str]]:
    """A runner with recorded steps, as far as they could be, and the lines about it."""
    cache = KVCache(backbone.kv_groups, [NUM_SLOTS], dtype=backbone.dtype, device=backbone.device)
    runner, lines = Runner(backbone, cache), list[str]()
    runner.record_graphs(max_rows=max_rows, capture=capture or Repetition(), progress=lines.append)
    return runner, lines


@dataclass
class Rows:
    """Rows of consecutive ids that are fed by hand, one step after the other."""

    count: int
    params: SamplingParams = field(default_factory=SamplingParams)
    num_groups: int = 1
    done: int = 0

    def prompts(self, length: int) -> Plan:
        return self._plan(length, lambda row: tuple(range(10 * row, 10 * row + length)))

    def follow(self) -> Plan:
        return self._plan(1, lambda _: ())

    def _plan(self, length: int, ids: object) -> Plan:
        start, self.done = self.done, self.done + length
        items = [self._item(row, start, length, ids(row)) for row in range(self.count)]  # type: ignore[operator]
        return Plan(writes=(), items=tuple(items))

    def _item(self, row: int, start: int, length: int, ids: tuple[int, ...]) -> PlanItem:
        slots = np.arange(start + length) + 16 + row * ROW_SLOTS
        sampling = SamplingState(self.params, ids).input(start)
        return PlanItem(
            id=row, kv=PackedItem(start, length, (slots,) * self.num_groups), position=start,
            token_ids=ids, follows=not ids, sampling=(sampling,),
        )  # fmt: skip


def answers(runner: Runner, rows: Rows, num_steps: int, num_under_way: int) -> list[list[int]]:
    """What rows say, where results are read so many steps late."""
    launched = [runner.run(rows.prompts(3), dict)]
    read = []
    for _ in range(num_steps):
        launched.append(runner.run(rows.follow(), dict))
        if len(read) + num_under_way < len(launched):
            read.append(launched[len(read)].result())
    read += [each.result() for each in launched[len(read) :]]
    said = [[result.tokens[row][0].token_id for row in range(rows.count)] for result in read]
    assert said == [each.sampled.ids.tolist() for each in launched if each.sampled]
    return said


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(do_sample=True, seed=3)])
def test_results_are_read_while_later_steps_are_under_way(
    backbone: DecoderOnly, params: SamplingParams
) -> None:
    cache = KVCache(backbone.kv_groups, [NUM_SLOTS], dtype=backbone.dtype, device=backbone.device)
    eager, (graphs, lines) = Runner(backbone, cache), new_runner(backbone)
    assert graphs._graphs is not None, lines
    expected = answers(eager, Rows(5, params), 12, 1)
    assert len({tuple(step) for step in expected}) > 10, "tokens vary"
    for num_under_way in (1, 2, 3):
        assert answers(graphs, Rows(5, params), 12, num_under_way) == expected


def test_a_row_with_nan_disturbs_no_other(backbone: DecoderOnly) -> None:
    clean, _ = new_runner(backbone)
    runner, _ = new_runner(backbone)
    plans = [Rows(5), Rows(5)]
    before = clean.run(plans[0].prompts(3), dict).result()
    runner.run(plans[1].prompts(3), dict).result()
    keys, _ = runner._cache.pools((runner._cache.groups[0].site, 0))
    keys[16 + 2 * ROW_SLOTS] = torch.nan  # of row 2
    runs = zip((clean, runner), plans, strict=True)
    after = [each.run(plan.follow(), dict).result().tokens for each, plan in runs]
    assert before.tokens
    assert not after[1][2][0].is_finite
    assert all(after[1][row] == after[0][row] for row in (0, 1, 3, 4))


class Broken(Repetition):
    """Replays nothing."""

    def record(self, work: Work) -> Work:
        work()
        return lambda: None


class Refusing(Repetition):
    """Raises from the given recording on, or up to it."""

    def __init__(self, error: Exception, numbers: range) -> None:
        self._error, self._numbers, self._count = error, numbers, count()

    def record(self, work: Work) -> Work:
        if next(self._count) in self._numbers:
            raise self._error
        return super().record(work)


def check_serves(runner: Runner) -> None:
    rows = Rows(3)
    assert runner.run(rows.prompts(3), dict).result().tokens
    assert runner.run(rows.follow(), dict).result().tokens


def test_recorded_steps_are_announced(backbone: DecoderOnly) -> None:
    runner, lines = new_runner(backbone)
    assert lines[0] == "recording graphs of decode steps, for up to 6 rows"
    assert lines[1].startswith("4 graphs of decode steps, for up to 6 rows: ")
    assert lines[1].endswith(" MiB")
    check_serves(runner)


@pytest.mark.parametrize(
    ("capture", "reason"),
    [
        (Broken(), "with 6 rows, logits differ by 1."),
        (Refusing(RuntimeError("operation not permitted\nwhen stream is capturing"), range(4, 5)),
         "operation not permitted when stream is capturing"),
        (Refusing(torch.OutOfMemoryError("CUDA out of memory"), range(9)), "memory holds none"),
    ],
)  # fmt: skip
def test_what_cannot_be_recorded_runs_eagerly(
    backbone: DecoderOnly, capture: Repetition, reason: str
) -> None:
    runner, lines = new_runner(backbone, capture)
    assert lines[-1].startswith(f"decode steps run without graphs: {reason}")
    assert runner._graphs is None
    check_serves(runner)


def test_graphs_that_memory_does_not_hold_are_left_out(backbone: DecoderOnly) -> None:
    runner, lines = new_runner(backbone, Refusing(torch.OutOfMemoryError("CUDA out of memory"), range(2)))
    assert lines[1:3] == ["no memory for the graph of 6 rows", "no memory for the graph of 4 rows"]
    assert runner._graphs is not None
    assert runner._graphs.sizes == [1, 2]
    check_serves(runner)


def test_attention_without_fixed_shapes_is_not_recorded() -> None:
    runner, lines = new_runner(packed_backbone(tiny_model("llama")))
    assert lines[-1] == "decode steps run without graphs: the shapes of TorchBackend change with every step"
    assert runner._graphs is None
    check_serves(runner)
