"""Blocks are given once, come back once, and a lost one is noticed."""

import pytest

from app.engine.blocks import BlockPool, KVBlocks, SlotTable


def test_slots_follow_blocks_and_a_shared_head_is_read_only() -> None:
    blocks = KVBlocks((9, 9), block_size=4)
    head = SlotTable(blocks)
    assert head.grow(6)
    own = SlotTable(blocks, head, head_slots=6)
    assert own.grow(6 + 5)
    for group in range(2):
        slots = own.slots(11)[group].tolist()
        assert slots[:6] == head.slots(6)[group].tolist()
        assert len(set(slots)) == 11
        assert min(slots) >= 4, "block 0 is nobody's"
    assert own.missing_blocks(6 + 8) == 0
    assert own.missing_blocks(6 + 9) == 1
    blocks.check_integrity([head, own])
    own.release()
    blocks.check_integrity([head])
    assert own.slots(99)[0].tolist() == head.slots(6)[0].tolist()


def test_growth_is_all_or_nothing_over_groups() -> None:
    blocks = KVBlocks((9, 4), block_size=4)
    table = SlotTable(blocks)
    assert not table.grow(16)
    assert [pool.num_free for pool in blocks.pools] == [8, 3]
    assert table.grow(12)
    assert (blocks.capacity, blocks.num_free) == (3, 0)
    assert blocks.usage == 1.0


def test_a_double_free_and_a_lost_block_are_noticed() -> None:
    pool = BlockPool(5, 4)
    taken = pool.take(2)
    pool.give_back(taken)
    with pytest.raises(AssertionError, match="only held blocks"):
        pool.give_back(taken)
    blocks = KVBlocks((5,), block_size=4)
    table = SlotTable(blocks)
    table.grow(8)
    with pytest.raises(AssertionError, match="holders differ"):
        blocks.check_integrity([])
    with pytest.raises(AssertionError, match="two holders"):
        blocks.check_integrity([table, table])
