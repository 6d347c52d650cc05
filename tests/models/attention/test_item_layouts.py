"""Layouts at fixed addresses give what fresh ones give, whatever they held before."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from app.models.attention.cascade import ALWAYS, NEVER, CascadeCosts
from app.models.attention.item_layouts import TritonLayout, layout_of, static_items
from app.models.attention.work_items import ItemPlanner
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
