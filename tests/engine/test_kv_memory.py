"""K/V memory is divided as rows need it, and long rows of a base with windows hold less of it."""

from dataclasses import dataclass

import pytest
import torch

from app.engine.blocks import KVBlocks
from app.engine.client import EngineStats
from app.engine.engine import Engine, EngineConfig
from app.engine.memory.kv_memory import kv_blocks
from app.engine.plan import SampledToken, StepResult
from app.engine.scheduler import Scheduler, SchedulerConfig
from app.engine.sequence import Sequence
from app.models.attention.kv_cache import KVGroup, group_layers
from app.prompt import LayerGeometry, ModelGeometry
from app.request import Request
from app.sites import Site
from benchmarks.completions import submit, submit_all
from tests.engine.conftest import Bench
from tests.engine.test_engine import wait_until

BLOCK_SIZE, MAX_ROWS, TOKEN_BUDGET = 16, 8, 64
FULL, WINDOW = LayerGeometry(2, 8, 8), LayerGeometry(2, 8, 8, window=32)
BLOCK_BYTES = BLOCK_SIZE * FULL.kv_width * 4  # of one layer in float32


@dataclass(frozen=True)
class Shape:
    """What the engine asks of a backbone to divide memory."""

    geometry: ModelGeometry
    kv_groups: tuple[KVGroup, ...]
    device: torch.device
    dtype: torch.dtype = torch.float32


def blocks_of(
    *layers: LayerGeometry,
    kv_cache_bytes: int,
    max_positions: int = 4096,
    max_rows: int = MAX_ROWS,
    cross: tuple[LayerGeometry, ...] = (),
    encoder: tuple[LayerGeometry, ...] = (),
) -> KVBlocks:
    geometry = ModelGeometry(
        architecture="test",
        hidden_size=8,
        vocab_size=100,
        max_positions=max_positions,
        max_source_positions=1024 if cross else 0,
        layers={Site.DECODER_SELF: layers, Site.DECODER_CROSS: cross, Site.ENCODER_SELF: encoder},
        dtype="float32",
        fingerprint="test",
    )
    return kv_blocks(
        Shape(geometry, group_layers(geometry.layers), torch.device("cpu")),  # type: ignore[arg-type]  # only what is asked for
        block_size=BLOCK_SIZE,
        kv_cache_bytes=kv_cache_bytes,
        max_rows=max_rows,
        token_budget=TOKEN_BUDGET,
    )


def test_one_group_gets_all_the_memory_and_no_more_than_its_rows_can_use() -> None:
    assert blocks_of(FULL, FULL, kv_cache_bytes=2 * BLOCK_BYTES * 7 + 5).capacity.tolist() == [7]
    useful = 2 * MAX_ROWS * 4096 // BLOCK_SIZE
    assert blocks_of(FULL, kv_cache_bytes=1 << 30).capacity.tolist() == [useful]
    windowed = blocks_of(WINDOW, kv_cache_bytes=1 << 30)
    assert windowed.capacity.tolist() == [2 * (7 * 3 + 7)], "7 rows' windows, and a chunk before the eighth's"


def test_groups_of_equal_shapes_share_a_pool() -> None:
    blocks = blocks_of(FULL, WINDOW, FULL, WINDOW, kv_cache_bytes=4 * BLOCK_BYTES * 50)
    assert [group.pool for group in blocks.groups] == [0, 0]
    assert blocks.capacity.tolist() == [100]


@pytest.mark.parametrize("num_bytes", [BLOCK_BYTES * count for count in (300, 3_000, 20_000)])
def test_of_unequal_groups_full_ones_get_more_where_rows_are_longer_than_windows(num_bytes: int) -> None:
    blocks = blocks_of(FULL, WINDOW, WINDOW, kv_cache_bytes=num_bytes)
    full, window = blocks.capacity.tolist()
    length = full // (2 * MAX_ROWS)  # in blocks: so long may all rows and prefixes be at a time
    needed = 2 * min(MAX_ROWS * length, 7 * 3 + 7)
    assert window >= needed, "windows don't run out before the full group does"
    assert num_bytes // BLOCK_BYTES - 3 <= window * 2 + full <= num_bytes // BLOCK_BYTES or full == 4096
    assert full >= window


def test_both_sites_of_a_decoder_draw_from_one_pool_and_an_encoder_needs_room_for_prefixes_only() -> None:
    wide = LayerGeometry(3, 8, 8)
    blocks = blocks_of(FULL, cross=(FULL,), encoder=(wide,), kv_cache_bytes=1 << 30)
    assert [group.pool for group in blocks.groups] == [0, 0, 1]
    rows, sources, prefixes = MAX_ROWS * 4096 // 16, MAX_ROWS * 1024 // 16, MAX_ROWS * 256 // 16
    assert blocks.capacity.tolist() == [2 * rows + 2 * sources, prefixes], "and as many prefixes as rows"
    alone = blocks_of(FULL, cross=(FULL,), encoder=(wide,), kv_cache_bytes=1 << 30, max_rows=2)
    assert alone.capacity[1] == 1024 // 16, "but one may be as long as a source"
    shared = blocks_of(FULL, cross=(FULL,), encoder=(FULL,), kv_cache_bytes=BLOCK_BYTES * 90)
    assert shared.capacity.tolist() == [90]
    small = blocks_of(FULL, cross=(FULL,), encoder=(wide,), kv_cache_bytes=BLOCK_BYTES * 1000)
    decoder, encoder = small.capacity.tolist()
    assert decoder > 3 * encoder > 0
    with pytest.raises(ValueError, match="don't hold one block"):
        blocks_of(FULL, cross=(FULL,), encoder=(wide,), kv_cache_bytes=BLOCK_BYTES * 3)


def test_memory_for_less_than_a_block_is_refused() -> None:
    with pytest.raises(ValueError, match="don't hold one block of 16 tokens"):
        blocks_of(FULL, WINDOW, WINDOW, kv_cache_bytes=3 * BLOCK_BYTES - 1)


def test_statistics_tell_free_blocks_from_those_of_idle_prefixes_and_slots_that_are_lost(
    bench: Bench,
) -> None:
    requests = [bench.request("a", text=(3,) * 21), bench.request("b", text=(4,) * 32)]
    for future in submit_all(bench.engine, requests):
        future.result(60)
    wait_until(lambda: bench.engine.stats().num_running == 0)
    stats = bench.engine.stats()
    assert (stats.kv_free_blocks, stats.kv_evictable_blocks) == (stats.kv_blocks - 4, 4)
    assert stats.unfilled_prefix_slots == 2 * 16 - 21
    assert stats.unfilled_request_slots == 0
    assert bench.engine.device_memory().total > 0


def test_slots_at_the_ends_of_running_rows_are_counted(bench: Bench) -> None:
    seen: list[EngineStats] = []
    config = EngineConfig(kv_cache_bytes=1 << 20)
    engine = Engine(bench.backbone, bench.source, config, on_step=lambda _: seen.append(engine.stats()))
    engine.start()
    submit(engine, bench.request("a", token_ids=(5,) * 20, max_new_tokens=40)).result(60)
    engine.stop()
    running = [stats for stats in seen if stats.num_running]
    assert {stats.unfilled_request_slots for stats in running} == set(range(16))
    assert all(stats.kv_free_blocks < stats.kv_blocks for stats in running)


def test_long_rows_hold_of_a_window_group_what_the_window_shows() -> None:
    """Six rows of 1,000 tokens in memory for hardly two rows without windows."""
    blocks = blocks_of(FULL, WINDOW, WINDOW, kv_cache_bytes=1 << 30)
    scheduler = Scheduler(blocks, SchedulerConfig(max_rows=MAX_ROWS, token_budget=TOKEN_BUDGET))
    sequences = [Sequence(Request(id=str(i), token_ids=(1,) * 900, max_new_tokens=100)) for i in range(6)]
    for sequence in sequences:
        scheduler.add(sequence)
    most = 0
    while scheduler.num_open:
        step = scheduler.schedule()
        for sequence in scheduler.running:
            assert sequence.table is not None
            full, window = sequence.table.num_blocks.tolist()
            assert full >= -(-len(sequence.tokens) // BLOCK_SIZE)
            assert window <= (3 if sequence.is_decoding else 7)
        most = max(most, int(blocks.capacity[1] - blocks.num_free[1]))
        tokens = {item.id: (SampledToken(5, 0.0, True),) for item in step.items if item.sampling}
        scheduler.update(step, StepResult(tokens), 0.0)
    assert most <= 5 * 3 + 2 * 7, "of 6 * 63 blocks that rows without windows hold"
    scheduler.check_integrity()
