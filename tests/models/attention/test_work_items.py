"""Work items cover what each token sees, exactly once, however they are split and shared."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from app.models.attention.backend import Context
from app.models.attention.cascade import ALWAYS, NEVER, CascadeCosts
from app.models.attention.work_items import (
    FIRST_QUERY,
    KEY_BEGIN,
    KEY_END,
    NUM_QUERIES,
    PARTIAL,
    QUERY_BEGIN,
    SEES_ALL,
    SLOTS_BEGIN,
    ItemPlanner,
    WorkItems,
)
from app.prompt import LayerGeometry
from tests.models.attention.contexts import steps

PLAIN = LayerGeometry(2, 16, 16, queries_per_kv=2)


def visible(contexts: Sequence[Context], geometry: LayerGeometry) -> list[Counter[int]]:
    """Return the slots that each token of the packed row sees, by the words of `AttentionBackend`."""
    seen = []
    for context in contexts:
        length = len(context.slots)
        for token in range(context.num_tokens):
            begin, end = 0, length
            if geometry.is_causal:
                end = length - context.num_tokens + token + 1
                if geometry.window is not None:
                    begin = max(0, end - geometry.window)
            seen.append(Counter(context.slots[begin:end].tolist()))
    return seen


def covered(planned: WorkItems, geometry: LayerGeometry, tile: int) -> list[Counter[int]]:
    """Return the slots that the items of each token read; check what else the kernels rely on."""
    slots = np.concatenate(planned.slots)
    num_tokens = len(planned.partial_begin) - 1
    seen: list[Counter[int]] = [Counter() for _ in range(num_tokens)]
    partials: list[list[int]] = [[] for _ in range(num_tokens)]
    assert (planned.row_items[:, NUM_QUERIES] == 1).all()
    assert (planned.tile_items[:, NUM_QUERIES] > 1).all()
    assert (planned.tile_items[:, NUM_QUERIES] <= tile).all()
    for item in [*planned.row_items, *planned.tile_items]:
        rows = planned.query_rows[item[QUERY_BEGIN] :][: item[NUM_QUERIES]]
        assert len(rows) == item[NUM_QUERIES]
        assert item[KEY_BEGIN] < item[KEY_END]
        for number, row in enumerate(rows.tolist()):
            keys = np.arange(item[KEY_BEGIN], item[KEY_END])
            query = item[FIRST_QUERY] + number
            if geometry.is_causal and len(rows) > 1:
                keys = keys[keys <= query]
                if geometry.window is not None and item[FIRST_QUERY] < SEES_ALL:
                    keys = keys[keys > query - geometry.window]
            places = item[SLOTS_BEGIN] + keys
            assert (places >= 0).all()
            seen[row].update(slots[places].tolist())
            partials[row].append(int(item[PARTIAL]))
    for numbers, (begin, end) in zip(partials, pairwise(planned.partial_begin.tolist()), strict=True):
        assert sorted(numbers) == list(range(len(numbers))), "each partial result comes from one item"
        assert end - begin == (len(numbers) if len(numbers) > 1 else 0)
    return seen


GEOMETRIES = st.sampled_from(
    [
        PLAIN,
        LayerGeometry(2, 16, 16, window=7),
        LayerGeometry(1, 16, 16, window=300),
        LayerGeometry(1, 16, 16, has_position_bias=True),
        LayerGeometry(3, 16, 16, is_causal=False),
    ]
)


@given(
    steps(),
    GEOMETRIES,
    st.integers(1, 9),
    st.sampled_from([1, 8, 40, 1000]),
    st.sampled_from([NEVER, ALWAYS, CascadeCosts(1.0, 500.0)]),
    st.integers(0, 3),
)
@settings(max_examples=150, derandomize=True, deadline=None)
def test_each_visible_key_is_read_once(
    contexts: list[Context],
    geometry: LayerGeometry,
    tile: int,
    num_programs: int,
    costs: CascadeCosts,
    num_padding: int,
) -> None:
    if geometry.window is not None:
        contexts = [context._replace(heads=()) for context in contexts]
    expected = visible(contexts, geometry)
    planner = ItemPlanner(geometry, tile, num_programs=num_programs, costs=costs)
    planned = planner.plan(contexts, len(expected) + num_padding)
    assert covered(planned, geometry, tile) == expected + [Counter([0])] * num_padding
