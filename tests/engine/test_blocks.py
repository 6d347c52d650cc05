"""Blocks are given once, come back once, and a lost one is noticed; windows give back what nobody sees."""

import pytest
import torch

from app.engine.blocks import BlockPool, KVBlocks, SlotTable, table_groups
from app.models.attention.kv_cache import group_layers
from app.prompt import LayerGeometry
from app.sites import Site


def kv_blocks(*num_blocks: int, windows: tuple[int | None, ...] = (), max_chunk: int = 8) -> KVBlocks:
    """Blocks of 4 slots; groups differ in their windows, or in their numbers of heads."""
    windows = windows or (None,) * len(num_blocks)
    layers = [LayerGeometry(1 + number, 4, 4, window) for number, window in enumerate(windows)]
    groups = table_groups(
        group_layers({Site.DECODER_SELF: layers}), torch.float32, block_size=4, max_chunk=max_chunk
    )
    return KVBlocks(groups, num_blocks)


def test_slots_follow_blocks_and_a_shared_head_is_read_only() -> None:
    blocks = kv_blocks(9, 9)
    head = SlotTable(blocks)
    assert head.grow(0, 6)
    own = SlotTable(blocks, head, head_slots=6)
    assert own.grow(6, 6 + 5)
    for group in range(2):
        slots = own.slots(11)[group].tolist()
        assert slots[:6] == head.slots(6)[group].tolist()
        assert len(set(slots)) == 11
        assert min(slots) >= 4, "block 0 is nobody's"
    assert own.missing_blocks(6, 6 + 8).tolist() == [0, 0]
    assert own.missing_blocks(6, 6 + 9).tolist() == [1, 1]
    blocks.check_integrity([head, own])
    own.release()
    blocks.check_integrity([head])
    assert own.slots(11) == (), "what was given back is named no more"
    assert head.slots(6)[0].tolist() == slots_of(head, 6)


def slots_of(table: SlotTable, num_slots: int) -> list[int]:
    (part, *_) = table.parts
    return [4 * block + i for block in part.blocks for i in range(4)][:num_slots]


def test_growth_is_all_or_nothing_over_groups() -> None:
    blocks = kv_blocks(9, 4)
    table = SlotTable(blocks)
    assert not table.grow(0, 16)
    assert [pool.num_free for pool in blocks.pools] == [8, 3]
    assert table.grow(0, 12)
    assert (blocks.capacity.tolist(), blocks.num_free.tolist()) == ([8, 3], [5, 0])
    assert blocks.usage == 1.0


def test_a_window_group_moves_on_with_its_table() -> None:
    """Prefill by chunks, then single tokens: it holds no more than the window, a chunk and two blocks."""
    blocks = kv_blocks(101, 6 + 1, windows=(None, 10), max_chunk=8)
    window = blocks.groups[1]
    assert (window.max_blocks, blocks.blocks_for(400).tolist()) == (6, [100, 6])
    table = SlotTable(blocks)
    written: dict[int, int] = {}  # device slot of the window group -> slot index
    start = 0
    while start < 400:
        count = min(8, 200 - start) if start < 200 else 1
        assert table.grow(start, max(200, start + 1)), "what it gives back is enough for what it takes"
        whole, seen = (slots.tolist() for slots in table.slots(start + count))
        assert len(whole) == len(set(whole)) == start + count
        written.update(zip(seen[-count:], range(start, start + count), strict=True))
        visible = range(max(0, start - 9), start + count)
        assert [written[slot] for slot in seen[-len(visible) :]] == list(visible)
        held = table.num_blocks.tolist()
        assert held[0] == -(-max(200, start + 1) // 4)
        assert held[1] <= window.max_blocks
        assert start < 210 or held[1] <= window.kept_blocks == 4
        blocks.check_integrity([table])
        start += count
    table.trim(400)
    assert table.num_blocks.tolist() == [100, 3]


def test_what_is_written_as_it_is_takes_only_what_the_window_leaves() -> None:
    blocks = kv_blocks(101, 6, windows=(None, 10))
    table = SlotTable(blocks)
    assert table.grow(41, 41)
    whole, seen = table.slots(41)
    assert (len(whole), len(seen)) == (41, 41 - 28)
    own = SlotTable(blocks, table, 41)
    assert own.grow(41, 43)
    assert own.slots(43)[1].tolist()[:10] == seen.tolist()[-10:]
    blocks.check_integrity([table, own])


def test_a_table_that_never_grows_keeps_all_that_it_got() -> None:
    blocks = kv_blocks(9)
    table = SlotTable(blocks)
    assert table.grow(0, 30)
    slots = table.slots(30)[0].tolist()
    table.trim(30)
    assert table.slots(30)[0].tolist() == slots == slots_of(table, 30)


def test_a_double_free_and_a_lost_block_are_noticed() -> None:
    pool = BlockPool(5)
    taken = pool.take(2)
    pool.give_back(taken)
    with pytest.raises(AssertionError, match="only held blocks"):
        pool.give_back(taken)
    blocks = kv_blocks(5)
    table = SlotTable(blocks)
    table.grow(0, 8)
    with pytest.raises(AssertionError, match="holders differ"):
        blocks.check_integrity([])
    with pytest.raises(AssertionError, match="two holders"):
        blocks.check_integrity([table, table])
