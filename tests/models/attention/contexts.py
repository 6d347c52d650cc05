"""Contexts of steps for tests: on heads that stand on heads, in any order of ids and slots."""

import numpy as np
from hypothesis import strategies as st

from app.models.attention.backend import Context, Head
from app.models.attention.kv_cache import Slots
from app.prompt import LayerGeometry

SIZES = st.one_of(st.integers(0, 40), st.integers(100, 900))


class Tree:
    """Heads that stand on one another, and contexts on them; every slot is another one."""

    def __init__(self) -> None:
        self._next = 1

    def take(self, count: int) -> Slots:
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


@st.composite
def trees(draw: st.DrawFn) -> tuple[Tree, "list[Node | None]"]:
    """Return heads to stand on; None is one of them."""
    tree = Tree()
    ids = draw(st.permutations(range(1, 6)))
    nodes: list[Node | None] = [None]
    for id_ in ids[: draw(st.integers(0, 5))]:
        nodes.append(Node(tree, id_, draw(SIZES), draw(st.sampled_from(nodes))))
    return tree, nodes


@st.composite
def steps(draw: st.DrawFn) -> list[Context]:
    """Return rows, some on heads, then chunks."""
    tree, nodes = draw(trees())
    heads = st.sampled_from(nodes)
    rows = [tree.context(1, draw(SIZES), draw(heads)) for _ in range(draw(st.integers(0, 12)))]
    num_chunks = draw(st.integers(0 if rows else 1, 3))
    chunks = [tree.context(draw(st.integers(2, 70)), draw(SIZES), draw(heads)) for _ in range(num_chunks)]
    return rows + chunks


@st.composite
def decode_rows(draw: st.DrawFn, geometry: LayerGeometry, max_rows: int, max_slots: int) -> list[Context]:
    """Return rows alone that name `max_slots` slots together at most."""
    tree, nodes = draw(trees())
    contexts: list[Context] = []
    for _ in range(draw(st.integers(0, max_rows))):
        context = tree.context(1, draw(SIZES), draw(st.sampled_from(nodes)))
        if not geometry.is_causal:
            read = [each.slots for each in contexts]
            again = draw(st.sampled_from([context.slots, *read]))
            context = Context(1, again, has_own=False)
        elif geometry.window is not None:
            context = Context(1, context.slots[-geometry.window :])
        if sum(len(each.slots) for each in (*contexts, context)) <= max_slots:
            contexts.append(context)
    return contexts
