"""Work items cover what each token sees, exactly once, however they are split and shared."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from app.models.attention.backend import Context, Head
from app.models.attention.cascade import CascadeCosts
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

PLAIN = LayerGeometry(2, 16, 16, queries_per_kv=2)
ALWAYS = CascadeCosts(0.0, 0.0)  # share whatever saves a key
Seen = list[list[tuple[int, int]]]  # of each token: slots, and their distances where they matter


class Tree:
    """Heads that stand on one another, and contexts on them; every slot is another one."""

    def __init__(self) -> None:
        self._next = 1

    def take(self, count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        self._next += count
        return np.arange(self._next - count, self._next)[::-1].copy()

    def context(self, num_tokens: int, num_before: int, head: "Node | None" = None) -> Context:
        """Return a context of tokens after a head and `num_before` slots of its own."""
        own = self.take(num_before + num_tokens)
        if head is None:
            return Context(num_tokens, own)
        return Context(num_tokens, np.concatenate([head.slots, own]), heads=head.heads)


class Node:
    def __init__(self, tree: Tree, id_: int, num_slots: int, parent: "Node | None" = None) -> None:
        own = tree.take(num_slots)
        self.slots = own if parent is None else np.concatenate([parent.slots, own])
        self.heads = (() if parent is None else parent.heads) + (Head(id_, len(self.slots)),)


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


@st.composite
def steps(draw: st.DrawFn) -> list[Context]:
    """Rows, some on heads that stand on heads, then chunks; the heads' ids are in no order."""
    tree = Tree()
    ids = draw(st.permutations(range(1, 6)))
    sizes = st.one_of(st.integers(0, 40), st.integers(100, 900))
    nodes: list[Node | None] = [None]
    for id_ in ids[: draw(st.integers(0, 5))]:
        nodes.append(Node(tree, id_, draw(sizes), draw(st.sampled_from(nodes))))
    rows = [
        tree.context(1, draw(sizes), draw(st.sampled_from(nodes))) for _ in range(draw(st.integers(0, 12)))
    ]
    chunks = [
        tree.context(draw(st.integers(2, 70)), draw(sizes), draw(st.sampled_from(nodes)))
        for _ in range(draw(st.integers(0 if rows else 1, 3)))
    ]
    return rows + chunks


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
    st.sampled_from([None, ALWAYS, CascadeCosts(1.0, 500.0)]),
    st.integers(0, 3),
)
@settings(max_examples=300, derandomize=True, deadline=None)
def test_each_visible_key_is_read_once(
    contexts: list[Context],
    geometry: LayerGeometry,
    tile: int,
    num_programs: int,
    costs: CascadeCosts | None,
    num_padding: int,
) -> None:
    if geometry.window is not None:
        contexts = [context._replace(heads=()) for context in contexts]
    expected = visible(contexts, geometry)
    planner = ItemPlanner(geometry, tile, num_programs=num_programs, costs=costs)
    planned = planner.plan(contexts, len(expected) + num_padding)
    assert covered(planned, geometry, tile) == expected + [Counter([0])] * num_padding
