"""Rows share leading slots where it saves more than it costs, and get the same attention either way."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from app.models.attention import cascade_timing
from app.models.attention.backend import Context
from app.models.attention.cascade import ALWAYS, NEVER, CascadeCosts, shared_heads
from app.models.attention.cascade_timing import Work, default_costs, measured_fixed
from app.models.attention.item_layouts import layout_of
from app.models.attention.triton import TritonBackend
from app.models.attention.work_items import NUM_QUERIES, ItemPlanner
from app.prompt import LayerGeometry
from tests.models.attention.contexts import Node, Tree, decode_rows, steps
from tests.models.attention.evaluated import evaluated

CPU = torch.device("cpu")
PLAIN = LayerGeometry(2, 4, 6, queries_per_kv=2)


def planner(costs: CascadeCosts, *, tile: int = 4, num_programs: int = 8) -> ItemPlanner:
    return ItemPlanner(PLAIN, tile, num_programs=num_programs, costs=costs)


def attention(planner: ItemPlanner, contexts: Sequence[Context]) -> np.ndarray:
    rng = np.random.default_rng(0)
    num_tokens = sum(context.num_tokens for context in contexts)
    pools = rng.normal(size=(40_000, 8)), rng.normal(size=(40_000, 12))
    return evaluated(
        layout_of(planner.plan(contexts), CPU), PLAIN, rng.normal(size=(4, num_tokens, 4)), pools
    )


@given(steps(), st.integers(2, 9), st.sampled_from([1, 8, 300]))
@settings(max_examples=40, derandomize=True, deadline=None)
def test_sharing_changes_no_result(contexts: list[Context], tile: int, num_programs: int) -> None:
    alone, sharing = (
        attention(planner(costs, tile=tile, num_programs=num_programs), contexts) for costs in (NEVER, ALWAYS)
    )
    np.testing.assert_allclose(sharing, alone, rtol=1e-9)


@given(decode_rows(PLAIN, 6, 1500))
@settings(max_examples=5, derandomize=True, deadline=None)
def test_the_kernels_give_the_same_shared_or_not(contexts: list[Context]) -> None:
    if not contexts:
        return
    geometry = LayerGeometry(1, 16, 16, queries_per_kv=2)
    generator = torch.Generator().manual_seed(0)
    pools = [torch.randn(20_000, 16, generator=generator) for _ in range(2)]
    query = torch.randn(2, len(contexts), 16, generator=generator)
    results = []
    for costs in (NEVER, ALWAYS):
        backend = TritonBackend(geometry, torch.float32, CPU, costs)
        results.append(
            backend.forward(
                query,
                *(query[:1], query[:1], (pools[0], pools[1]), backend.plan(contexts)),
                scaling=0.25,
                softcap=None,
                sinks=None,
                position_bias=None,
            )
        )
    torch.testing.assert_close(*results)


@given(steps(), st.randoms(use_true_random=False))
@settings(max_examples=40, derandomize=True, deadline=None)
def test_the_order_of_rows_changes_nothing(contexts: list[Context], random: Any) -> None:
    """A row's result is the same wherever it stands, and the same rows share."""
    num_rows = sum(context.num_tokens == 1 for context in contexts)
    order = [*range(num_rows)]
    random.shuffle(order)
    moved = [*(contexts[row] for row in order), *contexts[num_rows:]]

    def shared(contexts: Sequence[Context]) -> Counter[tuple[frozenset[int], int]]:
        heads, _ = shared_heads(contexts, 10_000, 4, 8, ALWAYS)
        own = [int(context.slots[-1]) for context in contexts]
        return Counter((frozenset(own[row] for row in head.rows), head.num_slots) for head in heads)

    assert shared(moved) == shared(contexts)
    assert planner(ALWAYS).gain(moved) == planner(ALWAYS).gain(contexts)


def rows_of(tasks: Sequence[tuple[int, int]]) -> list[Context]:
    """Return rows of tasks, in turn: each some rows, on so many shared slots, and 50 of their own."""
    tree = Tree()
    rows = []
    for number, (num_rows, num_slots) in enumerate(tasks):
        node = Node(tree, number, num_slots)
        rows += [tree.context(1, 49, node) for _ in range(num_rows)]
    return [row for start in range(3) for row in rows[start::3]]


def num_queries(contexts: Sequence[Context], costs: CascadeCosts) -> Counter[int]:
    planned = planner(costs, tile=8, num_programs=2).plan(contexts)
    return Counter(planned.tile_items[:, NUM_QUERIES].tolist())


@pytest.mark.parametrize(
    ("tasks", "tiles"),
    [
        ([(8, 1000)], {8: 1}),
        ([(9, 1000)], {4: 1, 5: 1}),  # tiles of one size
        ([(5, 1000), (3, 2000), (1, 9000)], {5: 1, 3: 1}),
        ([(4, 20), (2, 40)], {}),  # merging would cost more
        ([(4, 20), (8, 3000)], {8: 1}),  # a short one that doesn't pay stays out of what does
    ],
)
def test_rows_share_what_pays(tasks: list[tuple[int, int]], tiles: dict[int, int]) -> None:
    assert num_queries(rows_of(tasks), CascadeCosts(10.0, 1500.0)) == tiles


@pytest.mark.parametrize("fixed", [6999.0, 7000.0])
def test_sharing_must_save_more_than_it_costs(fixed: float) -> None:
    """8 rows read 1,000 slots once instead of 8 times."""
    assert num_queries(rows_of([(8, 1000)]), CascadeCosts(0.0, fixed)) == ({8: 1} if fixed < 7000 else {})


def test_rows_of_several_tasks_share_what_all_stand_on() -> None:
    """Two rows of a task have 600 slots together, six rows of three tasks 500."""
    tree = Tree()
    root = Node(tree, 1, 500)
    nodes = [Node(tree, number, 100, root) for number in (2, 3, 4)]
    rows = [tree.context(1, 10, node) for _ in range(2) for node in nodes]
    assert num_queries(rows, ALWAYS) == {6: 1}


@pytest.mark.parametrize(
    "geometry",
    [
        LayerGeometry(2, 16, 16, window=10_000),
        LayerGeometry(2, 16, 16, has_position_bias=True),
        LayerGeometry(2, 16, 16, is_causal=False),
    ],
)
def test_what_depends_on_a_query_s_place_is_not_shared(geometry: LayerGeometry) -> None:
    contexts = rows_of([(8, 2000)])
    planned = ItemPlanner(geometry, 8, num_programs=8, costs=ALWAYS).plan(contexts)
    assert not len(planned.tile_items)
    assert not ItemPlanner(geometry, 8, num_programs=8, costs=ALWAYS).may_share


class Clocked:
    """Takes the time that a device of known costs would take."""

    clock = 0.0

    def __init__(self, planner: ItemPlanner, fixed: float) -> None:
        self._planner, self._fixed = planner, fixed

    def plan(self, contexts: Sequence[Context]) -> float:
        planned = self._planner.plan(contexts)
        items = [*planned.row_items, *planned.tile_items]
        keys = sum(int(item[4] - item[3]) for item in items)
        return keys + (self._fixed if len(planned.tile_items) else 0.0)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, pools: Any, layout: float, **_: Any
    ) -> Tensor:
        Clocked.clock += layout
        return query


def clocked_seconds(work: Work) -> float:
    begin = Clocked.clock
    work()
    return Clocked.clock - begin


@pytest.mark.parametrize("fixed", [0.0, 5_000.0, 50_000.0, 1e9])
def test_the_threshold_is_what_a_device_shows(fixed: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cascade_timing, "_POOL_BYTES", 1 << 20)
    alone, sharing = (planner(costs, tile=16, num_programs=100) for costs in (NEVER, ALWAYS))
    found = measured_fixed(
        PLAIN,
        torch.float32,
        CPU,
        Clocked(alone, fixed),
        Clocked(sharing, fixed),
        sharing.gain,
        clocked_seconds,
    )
    assert found >= fixed, "nothing is shared that costs"
    assert found == float("inf") if fixed == 1e9 else found <= 5 * fixed + 1000


def test_costs_that_are_not_measured_are_in_bytes() -> None:
    geometry = LayerGeometry(8, 128, 128, queries_per_kv=4)
    costs = default_costs(geometry, torch.bfloat16)
    assert costs.partial == pytest.approx(4 * 130 * 8 / 512)
    assert 8_000 <= costs.fixed <= 20_000
