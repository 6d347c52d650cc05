"""A GPU's memory is divided by what the largest steps took; here with given figures, and steps on a CPU."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

from app.engine.engine import Engine, EngineConfig
from app.engine.memory.device import DeviceMemory, device_memory
from app.engine.memory.division import MemoryPlan, plan_memory
from app.engine.memory.kv_memory import kv_cache_bytes, planned
from app.engine.memory.trial_steps import StepPeaks, Trials, trial_cache
from app.engine.plan import Plan
from app.engine.runner import Runner
from app.engine.scheduler import SchedulerConfig
from app.host_memory import host_memory
from app.models.backbone import Backbone
from app.models.decoder_only import DecoderOnly
from tests.engine.conftest import Bench
from tests.engine.padded_backend import use_padded_backends
from tests.tiny_models import packed_backbone, packed_seq2seq, tiny_model, tiny_seq2seq

GIB = 1 << 30
BOUNDS = SchedulerConfig(max_rows=4, token_budget=600, speculate=2)
FREE_GPU = DeviceMemory(total=80 * GIB, free=63 * GIB, allocated=15 * GIB, reserved=16 * GIB)
PEAKS = StepPeaks(largest=3 * GIB, decode=GIB // 4, per_slot=0.0)


def plan_of(
    memory: DeviceMemory = FREE_GPU,
    peaks: StepPeaks = PEAKS,
    *,
    utilization: float = 0.9,
    num_graphs: int = 0,
    asked: int | None = None,
) -> MemoryPlan:
    return plan_memory(
        memory,
        peaks,
        utilization=utilization,
        num_graphs=num_graphs,
        bytes_per_slot=1 << 17,
        kv_cache_bytes=asked,
    )


def test_keys_and_values_get_what_the_model_and_the_largest_step_leave_of_the_servers_share() -> None:
    assert plan_of().kv_cache == (72 - 16 - 3) * GIB
    assert plan_of(utilization=0.5).kv_cache == (40 - 16 - 3) * GIB
    with_graphs = plan_of(num_graphs=8)
    assert with_graphs.graphs == GIB // 4 + (8 * 12 + 64 << 20)
    assert with_graphs.kv_cache == plan_of().kv_cache - with_graphs.graphs


def test_what_other_programs_hold_is_theirs_and_a_reserve_stays_free() -> None:
    shared = DeviceMemory(total=80 * GIB, free=20 * GIB, allocated=15 * GIB, reserved=16 * GIB)
    reserve = int(0.02 * 80 * GIB)
    assert plan_of(shared).kv_cache == 20 * GIB - reserve - 3 * GIB
    small = DeviceMemory(total=8 * GIB, free=6 * GIB, allocated=GIB, reserved=GIB)
    assert plan_of(small, utilization=1).kv_cache == 6 * GIB - 3 * GIB - (256 << 20)


def test_steps_that_take_more_for_each_slot_leave_less_for_slots() -> None:
    """As attention does that copies contexts: 64 KiB for a slot of 128."""
    plan = plan_of(peaks=StepPeaks(3 * GIB, GIB // 4, per_slot=float(1 << 16)))
    assert plan.kv_cache == pytest.approx((72 - 16 - 3) * GIB / 1.5, rel=1e-6)
    assert plan.activations + plan.kv_cache <= plan.room


def test_bytes_that_are_asked_for_are_given_where_they_fit() -> None:
    assert plan_of(asked=5 * GIB).kv_cache == 5 * GIB
    assert plan_of(asked=53 * GIB).kv_cache == 53 * GIB
    with pytest.raises(ValueError, match=r"--kv-cache-bytes 56908316672 \(53.00 GiB\) doesn't fit.*at most"):
        plan_of(asked=53 * GIB, num_graphs=1)


@pytest.mark.parametrize(
    ("memory", "peaks", "words"),
    [
        (FREE_GPU, StepPeaks(60 * GIB, GIB, 0.0), "largest step 60.00.*lower --token-budget, --max-rows"),
        (DeviceMemory(24 * GIB, GIB // 2, 22 * GIB, 23 * GIB), PEAKS, "model takes 23.00.*smaller base"),
        (
            DeviceMemory(80 * GIB, 2 * GIB, 16 * GIB, 16 * GIB),
            PEAKS,
            "and the driver 62.00.*end other programs",
        ),
    ],
    ids=["step", "model", "other programs"],
)
@pytest.mark.parametrize("asked", [None, GIB])
def test_what_does_not_fit_is_named_with_what_can_be_lowered(
    memory: DeviceMemory, peaks: StepPeaks, words: str, asked: int | None
) -> None:
    with pytest.raises(ValueError, match=words):
        plan_of(memory, peaks, asked=asked)


def test_the_plan_is_said_in_one_line() -> None:
    assert str(plan_of()) == (
        "80.00 GiB: model 16.00, largest step 3.00, CUDA graphs 0.00, keys and values 53.00, left 8.00"
    )


@dataclass
class CannedMeter:
    """Lets work run, and says what a GPU would have said."""

    peaks: list[int]
    memories: list[DeviceMemory] = field(default_factory=lambda: [FREE_GPU])

    def peak(self, work: Callable[[], object]) -> int:
        work()
        return self.peaks.pop(0)

    def memory(self) -> DeviceMemory:
        return self.memories[0]


BACKBONES: dict[str, Callable[[], Backbone]] = {
    "llama": lambda: packed_backbone(tiny_model("llama")),
    "gemma2": lambda: packed_backbone(tiny_model("gemma2")),
    "t5": lambda: packed_seq2seq(tiny_seq2seq("t5")),
    "bart": lambda: packed_seq2seq(tiny_seq2seq("bart")),
}


@pytest.mark.parametrize("architecture", BACKBONES)
def test_the_largest_steps_run_before_there_is_memory_for_what_they_see(architecture: str) -> None:
    backbone = BACKBONES[architecture]()
    trials = Trials(backbone.geometry, backbone.kv_groups, BOUNDS, max_slots=5000)
    runner = Runner(backbone, trial_cache(backbone))
    drawn, chunk, *encoding = trials.largest()
    assert num_tokens(drawn) == num_tokens(chunk) == BOUNDS.token_budget
    result = runner.run(drawn, dict).result()
    num_drawn, num_scored = (sum(map(len, each.values())) for each in (result.tokens, result.scores))
    assert num_drawn == BOUNDS.max_rows * (1 + BOUNDS.speculate)
    assert num_drawn + num_scored == BOUNDS.token_budget
    after_chunk = runner.run(chunk, dict).result().tokens
    tokens = [token for each in (result.tokens, after_chunk) for row in each.values() for token in row]
    assert all(token.is_finite for token in tokens), "what nothing wrote is zeros"
    for plan in encoding:
        num_encoded = sum(source.kv.num_tokens for source in plan.sources)
        assert num_encoded >= backbone.geometry.max_source_positions
        assert {item.reads for item in plan.items} == {source.id for source in plan.sources}
        assert runner.run(plan, dict).result().tokens
    assert len(encoding) == backbone.geometry.has_encoder


def num_tokens(plan: Plan) -> int:
    return sum(item.kv.num_tokens for item in plan.items)


def test_memory_is_planned_by_what_steps_took(caplog: pytest.LogCaptureFixture) -> None:
    """Two figures for rows that see few slots and many, then one for each candidate of the largest step."""
    backbone = packed_backbone(tiny_model("llama"))
    bytes_per_slot = sum(group.bytes_per_slot(backbone.dtype) for group in backbone.kv_groups)
    seen = BOUNDS.max_rows * (min(4096, backbone.geometry.max_positions - 1) - 16)
    meter = CannedMeter([GIB, GIB + seen * bytes_per_slot, 2 * GIB, 3 * GIB])
    with caplog.at_level("INFO", "promptplex.engine"):
        plan = planned(backbone, BOUNDS, meter, utilization=0.9, num_graphs=11, asked=None)
    assert plan.graphs == 0, "steps of torch's attention can't be recorded"
    assert plan.kv_cache == pytest.approx((72 - 16 - 3) * GIB / 2, rel=1e-6)
    assert "keys and values" in caplog.text
    assert not meter.peaks
    use_padded_backends(backbone)
    with_graphs = planned(
        backbone,
        BOUNDS,
        CannedMeter([GIB, GIB, 2 * GIB, 3 * GIB]),
        utilization=0.9,
        num_graphs=11,
        asked=None,
    )
    assert with_graphs.kv_cache == (72 - 16 - 3 - 1) * GIB - (11 * 12 + 64 << 20)


def test_a_largest_step_without_room_is_refused_with_what_to_lower(llama_backbone: DecoderOnly) -> None:
    class FullMeter(CannedMeter):
        def peak(self, work: Callable[[], object]) -> int:
            torch.empty(1 << 60, dtype=torch.uint8)
            raise AssertionError("no machine has so much")

    with pytest.raises(ValueError, match=r"600 tokens and 4 rows: of 80.00 GiB the model takes 16.00"):
        planned(llama_backbone, BOUNDS, FullMeter([]), utilization=0.9, num_graphs=11, asked=None)


def test_a_fault_in_a_trial_is_raised_as_it_is(llama_backbone: DecoderOnly) -> None:
    class FaultyMeter(CannedMeter):
        def peak(self, work: Callable[[], object]) -> int:
            raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        planned(llama_backbone, BOUNDS, FaultyMeter([]), utilization=0.9, num_graphs=11, asked=None)


def test_a_cpu_gets_a_share_of_what_is_free_and_no_more_than_it_has(bench: Bench) -> None:
    total, _ = host_memory()
    free = kv_cache_bytes(bench.backbone, BOUNDS, utilization=0.9, num_graphs=11, asked=None)
    assert 0 < free < total // 4
    assert kv_cache_bytes(bench.backbone, BOUNDS, utilization=0.9, num_graphs=11, asked=GIB) == GIB
    with pytest.raises(ValueError, match=r"--kv-cache-bytes .* is more than the .* GiB of memory"):
        Engine(bench.backbone, bench.source, EngineConfig(kv_cache_bytes=total + 1))


def test_a_cpus_memory_is_read() -> None:
    memory = device_memory(torch.device("cpu"))
    assert memory.total > memory.free > 0
    assert memory.total > memory.allocated > 50 << 20, "torch alone takes more"
    assert memory.unused == 0
