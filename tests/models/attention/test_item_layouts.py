"""Layouts at fixed addresses give what fresh ones give, whatever they held before."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from app.models.attention.backend import Context, Head
from app.models.attention.cascade import ALWAYS, MIN_KEYS, NEVER, CascadeCosts
from app.models.attention.item_layouts import TritonLayout, layout_of, static_items
from app.models.attention.work_items import NUM_QUERIES, ItemPlanner
from app.prompt import LayerGeometry
from tests.models.attention.contexts import decode_rows
from tests.models.attention.evaluated import evaluated

CPU = torch.device("cpu")
SELF = LayerGeometry(2, 4, 6, queries_per_kv=2)
WINDOWED = LayerGeometry(2, 4, 6, queries_per_kv=2, window=9)
CROSS = LayerGeometry(2, 4, 6, queries_per_kv=2, is_causal=False)
ROW_COUNTS = (1, 2, 4, 8, 16)
MAX_SLOTS = 4000


def planner_for(geometry: LayerGeometry, tile: int, num_programs: int, costs: CascadeCosts) -> ItemPlanner:
    return ItemPlanner(geometry, tile, num_programs=num_programs, costs=costs)


class Step:
    """Numbers for a step's queries, and pools of keys and values."""

    def __init__(self, num_rows: int, geometry: LayerGeometry) -> None:
        rng = np.random.default_rng(num_rows)
        heads, slots = geometry.num_kv_heads, 20_000
        self.geometry = geometry
        self.query = rng.normal(size=(heads * geometry.queries_per_kv, num_rows, geometry.key_dim))
        self.pools = (
            rng.normal(size=(slots, heads * geometry.key_dim)),
            rng.normal(size=(slots, heads * geometry.value_dim)),
        )
        for pool in self.pools:
            pool[0] = 0

    def output(self, layout: TritonLayout) -> np.ndarray:
        return evaluated(layout, self.geometry, self.query, self.pools)


def addresses(layout: TritonLayout) -> list[int]:
    return [each.data_ptr() for each in layout if isinstance(each, Tensor)]


@given(st.data())
@settings(max_examples=60, derandomize=True, deadline=None)
def test_a_filled_layout_gives_what_a_fresh_one_gives(data: st.DataObject) -> None:
    geometry = data.draw(st.sampled_from([SELF, WINDOWED, CROSS]))
    tile, num_programs = data.draw(st.integers(1, 6)), data.draw(st.sampled_from([1, 16, 200]))
    planner = planner_for(geometry, tile, num_programs, data.draw(st.sampled_from([NEVER, ALWAYS])))
    layouts = static_items(planner, ROW_COUNTS, MAX_SLOTS, CPU)
    before = [addresses(each.layout) for each in layouts]
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(ROW_COUNTS) - 1))
        contexts = data.draw(decode_rows(geometry, ROW_COUNTS[place], MAX_SLOTS))
        assert layouts[place].fits(contexts)
        layouts[place].fill(contexts)
        step = Step(ROW_COUNTS[place], geometry)
        found = step.output(layouts[place].layout)
        assert (found[len(contexts) :] == 0).all(), "padding reads the padding slot"
        if contexts:
            fresh = step.output(layout_of(plain(geometry).plan(contexts, ROW_COUNTS[place]), CPU))
            np.testing.assert_allclose(found, fresh, rtol=1e-9)
    assert [addresses(each.layout) for each in layouts] == before


def plain(geometry: LayerGeometry) -> ItemPlanner:
    """Return a planner that neither splits nor shares."""
    return planner_for(geometry, 1, 1, NEVER)


@pytest.mark.parametrize("geometry", [SELF, CROSS])
def test_nothing_is_left_of_a_larger_step(geometry: LayerGeometry) -> None:
    """Larger ones have been in all of the host's buffers, in their own layouts and in this one."""
    planner = planner_for(geometry, 4, 200, ALWAYS)
    layouts = static_items(planner, ROW_COUNTS, MAX_SLOTS, CPU)
    slots = np.arange(1, 4001).reshape(8, 500)
    large = [Context(1, slots[row // 2], geometry.is_causal) for row in range(8)]
    if geometry.is_causal:
        large = [row._replace(heads=(Head(number // 2, 300),)) for number, row in enumerate(large)]
    for _ in range(6):
        layouts[-1].fill(large)
        layouts[-2].fill(large)
    small = [Context(1, slots[-1][:3], geometry.is_causal)]
    layouts[-2].fill(small)
    step = Step(8, geometry)
    fresh = step.output(layout_of(plain(geometry).plan(small, 8), CPU))
    np.testing.assert_allclose(step.output(layouts[-2].layout), fresh, rtol=1e-9)
    used = [int((each[:, NUM_QUERIES] > 0).sum()) for each in layouts[-2].layout[2:4]]
    assert sum(used) <= 8


def rows_up_to(seed: int, max_rows: int, max_slots: int, *, has_own: bool) -> list[Context]:
    """Return rows of all lengths that fit, many of them just so that a part more is made of them."""
    rng = np.random.default_rng(seed)
    exact = [1, MIN_KEYS - 1, MIN_KEYS, 2 * MIN_KEYS, 2 * MIN_KEYS + 1, 1600]
    most = rng.choice([10, 300, 3000])
    slots, rows = np.arange(1, 3001), []
    for _ in range(rng.integers(0, max_rows, endpoint=True)):
        length = int(rng.choice(exact) if rng.random() < 0.5 else rng.integers(1, most, endpoint=True))
        length = min(length, max_slots - sum(len(row.slots) for row in rows))
        if not length:
            break
        heads = [Head(id_, size) for id_, size in enumerate([40, 500, 1500]) if size < length]
        own = slots[:length]
        if rows and len(rows[-1].slots) <= length and not has_own:
            own = rows[-1].slots
        rows.append(Context(1, own, has_own, tuple(heads[-1:]) if has_own else ()))
    return rows


@given(st.data())
@settings(max_examples=150, derandomize=True, deadline=None)
def test_no_step_needs_more_than_its_layout_has(data: st.DataObject) -> None:
    has_own = data.draw(st.booleans())
    geometry = LayerGeometry(data.draw(st.integers(1, 8)), 16, 16, is_causal=has_own)
    planner = ItemPlanner(
        geometry,
        data.draw(st.integers(1, 20)),
        num_programs=data.draw(st.sampled_from([1, 50, 400])),
        costs=data.draw(st.sampled_from([NEVER, ALWAYS])),
    )
    num_rows, max_slots = data.draw(st.integers(1, 40)), data.draw(st.sampled_from([100, 128, 3000, 20_000]))
    capacity = planner.capacity(num_rows, max_slots)
    contexts = rows_up_to(data.draw(st.integers(0, 1 << 30)), num_rows, max_slots, has_own=has_own)
    planned = planner.plan(contexts, num_rows)
    assert len(planned.query_rows) <= capacity.query_rows
    assert len(planned.row_items) <= capacity.row_items
    assert len(planned.tile_items) <= capacity.tile_items
    assert planned.partial_begin[-1] <= capacity.partials
    assert sum(map(len, planned.slots)) <= max_slots + 1


def test_larger_layouts_have_room_for_what_smaller_ones_hold() -> None:
    """They share their memory, which is as large as the largest one's."""
    for costs in (NEVER, ALWAYS):
        planner = ItemPlanner(SELF, 5, num_programs=50, costs=costs)
        needs = [planner.capacity(rows, MAX_SLOTS) for rows in range(1, 70)]
        assert all((np.diff(column) >= 0).all() for column in zip(*needs, strict=True))


def test_what_does_not_fit_is_known_before() -> None:
    (layout,) = static_items(plain(SELF), [2], 10, CPU)
    assert layout.fits([Context(1, np.arange(1, 6))] * 2)
    assert not layout.fits([Context(1, np.arange(1, 3))] * 3)
    assert not layout.fits([Context(1, np.arange(1, 6)), Context(1, np.arange(1, 7))])
