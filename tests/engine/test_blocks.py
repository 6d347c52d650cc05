"""Blocks are given once, come back once, and a lost one is noticed; windows give back what nobody sees."""

import pytest
import torch

from app.engine.block_pool import BlockPool
from app.engine.blocks import KVBlocks, SlotTable, table_groups
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
    with pytest.raises(AssertionError, match="holders differ"):
        blocks.check_integrity([table, table])


def contents(device: dict[tuple[int, int], object], table: SlotTable, num_slots: int) -> list[list[object]]:
    """What a table's slots hold, in each group of one pool each."""
    return [
        [device.get((number, slot)) for slot in slots] for number, slots in enumerate(table.slots(num_slots))
    ]


def put(
    device: dict[tuple[int, int], object], blocks: KVBlocks, table: SlotTable, start: int, *what: object
) -> None:
    """Grow a table, copy what is due, and write to its next slots."""
    assert table.grow(start, start + len(what))
    for copies in blocks.take_copies():
        for source, target in zip(copies.sources.tolist(), copies.targets.tolist(), strict=True):
            device[copies.pool, target] = device[copies.pool, source]
    for number, slots in enumerate(table.slots(start + len(what))):
        device.update({(number, slot): x for slot, x in zip(slots[-len(what) :].tolist(), what, strict=True)})


def test_forks_share_blocks_and_copy_only_the_one_that_they_write_into() -> None:
    blocks = kv_blocks(20, 20, windows=(None, 10))
    device: dict[tuple[int, int], object] = {}
    head = SlotTable(blocks)
    put(device, blocks, head, 0, *"abcdef")
    first = SlotTable(blocks, head, head_slots=6)
    put(device, blocks, first, 6, *range(6))
    others = [first.fork(), first.fork()]
    blocks.check_integrity([head, first, *others])
    free = blocks.num_free
    for name, table in zip("xyz", (first, *others), strict=True):
        put(device, blocks, table, 12, name)
    assert (free - blocks.num_free).tolist() == [2, 2], "the last one to write has the block alone by then"
    for name, table in zip("xyz", (first, *others), strict=True):
        whole, seen = contents(device, table, 13)
        assert whole == [*"abcdef", *range(6), name]
        assert seen[-10:] == whole[-10:]
    shared = set(first.parts[0].blocks) & set(others[0].parts[0].blocks)
    assert len(shared) == 1, "the full block stays one"
    blocks.check_integrity([head, first, *others])
    first.release()
    blocks.check_integrity([head, *others])
    assert contents(device, others[0], 13)[0] == [*"abcdef", *range(6), "y"]


def test_a_fork_at_a_block_s_end_copies_nothing() -> None:
    blocks = kv_blocks(20)
    first = SlotTable(blocks)
    assert first.grow(0, 8)
    other = first.fork()
    assert first.missing_blocks(8, 9).tolist() == [1]
    assert first.grow(8, 9)
    assert other.grow(8, 9)
    assert blocks.take_copies() == ()
    assert first.slots(9)[0].tolist()[:8] == other.slots(9)[0].tolist()[:8]
    blocks.check_integrity([first, other])


def test_a_copy_that_does_not_fit_changes_nothing_and_one_for_a_freed_block_is_dropped() -> None:
    blocks = kv_blocks(3)
    first = SlotTable(blocks)
    assert first.grow(0, 6)
    other = first.fork()
    assert not first.grow(6, 7), "there is no block for the copy"
    blocks.check_integrity([first, other])
    other.release()
    assert first.grow(6, 7), "it has the block alone now"
    blocks = kv_blocks(4)
    first = SlotTable(blocks)
    assert first.grow(0, 6)
    other = first.fork()
    assert other.grow(6, 7)
    other.release()
    assert blocks.take_copies() == ()


def test_forks_of_a_window_give_back_what_nobody_sees() -> None:
    """Forks move on at their own pace; a block behind all their windows is free."""
    blocks = kv_blocks(101, 30, windows=(None, 10))
    device: dict[tuple[int, int], object] = {}
    first = SlotTable(blocks)
    put(device, blocks, first, 0, *range(7))
    tables = [first, first.fork(), first.fork()]
    texts: list[list[object]] = [[*range(7)] for _ in tables]
    for start in range(7, 60):
        for number, table in enumerate(tables):
            put(device, blocks, table, start, (number, start))
            texts[number].append((number, start))
            whole, seen = contents(device, table, start + 1)
            assert whole == texts[number]
            assert seen[-10:] == whole[-10:]
        blocks.check_integrity(tables)
        if start % 5 == 0:
            tables.pop(0).release()
            tables.append(tables[-1].fork())
            texts = [*texts[1:], [*texts[-1]]]
    for table in tables:
        table.release()
    blocks.check_integrity([])
    assert (blocks.num_free == blocks.capacity).all()
