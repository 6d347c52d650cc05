"""A step's attention as work items: which query tokens attend to which part of a list of slots.

The kernels for GPUs (app/models/cuda/) run one program for each item and kv head. Decode rows with long
contexts are split in several items; a chunk's queries are cut in tiles; rows that begin with the same long
run of slots may be one item over it (cascade.py). Where a token has several items, their partial results are
merged.

Shapes: T tokens of the packed row, Q query tokens of all items, L slots of all contexts, W items. A *range*
is an item that is not split yet: it has the columns of one.
"""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from app.models.attention.backend import Context
from app.models.attention.cascade import MIN_KEYS, NEVER, CascadeCosts, SharedHead, shared_heads
from app.models.attention.kv_cache import PADDING_SLOT, Slots
from app.prompt import LayerGeometry

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]

SEES_ALL = 1 << 30  # as an item's first query index: every query sees all of its keys

# Columns of an item.
QUERY_BEGIN = 0  # where its query tokens begin in `query_rows`
NUM_QUERIES = 1  # 0: there is no item here
# Where the context's slots begin in `slots`: key k is at SLOTS_BEGIN + k. It may be negative, where only
# later keys stand there.
SLOTS_BEGIN = 2
KEY_BEGIN, KEY_END = 3, 4  # which of the context's slots it attends to, as indices into its list
# The index in that list of its first query's own slot; query i sees keys up to FIRST_QUERY + i. SEES_ALL:
# each query sees all of its keys (no window then, and no position bias).
FIRST_QUERY = 5
PARTIAL = 6  # which of its tokens' partial results it computes, from 0 on; the same for all of its tokens
NUM_COLUMNS = 8

_UNIT = 64  # ranges are split at multiples: whole blocks of keys of the kernels
_PADDING = np.array([PADDING_SLOT])
_NONE = np.empty(0, np.int64)


class WorkItems(NamedTuple):
    """All that the kernels need to know of a step in one KV group."""

    query_rows: Int32  # [Q], places in the packed row
    slots: Sequence[Slots]  # in a row [L], of the pools
    row_items: Int32  # [W, NUM_COLUMNS], of one query token each
    tile_items: Int32  # [W, NUM_COLUMNS], of several
    # [T + 1]: which partial results are a token's, at least two; none: its only item gives the final result.
    partial_begin: Int32


class Capacity(NamedTuple):
    """What a layout of decoding rows needs at most, whatever their contexts are."""

    query_rows: int
    row_items: int
    tile_items: int
    partials: int


class ItemPlanner:
    """Plans items for layers of one geometry on one device."""

    def __init__(
        self,
        geometry: LayerGeometry,
        queries_per_tile: int,
        *,
        num_programs: int,
        costs: CascadeCosts,
    ) -> None:
        """`num_programs`: as many fill the device a few times."""
        self._is_causal = geometry.is_causal
        self._window = geometry.window if geometry.is_causal else None
        self._tile = queries_per_tile
        self._num_items = -(-num_programs // geometry.num_kv_heads)
        is_relative = self._window is not None or geometry.has_position_bias  # to the query's own slot
        self.may_share = self._is_causal and not is_relative and costs != NEVER
        self._costs = costs

    def capacity(self, num_rows: int, max_slots: int) -> Capacity:
        """Return what `plan` makes at most of `num_rows` contexts of one token and `max_slots` in all."""
        num_parts = min(self._num_items, max_slots // MIN_KEYS)  # beside one of each range
        tile = min(self._tile, num_rows)
        if tile == 1 or (self._is_causal and not self.may_share):
            return Capacity(num_rows, num_rows + num_parts, 0, num_rows + num_parts)
        partials = 2 * num_rows + (tile + 1) * num_parts
        return Capacity(2 * num_rows, num_rows + num_parts, num_rows // 2 + num_parts, partials)

    def plan(self, contexts: Sequence[Context], num_tokens: int = 0) -> WorkItems:
        """Plan a step, in the order of the packed row.

        Where the contexts have fewer tokens than `num_tokens`, more follow that attend to the padding slot.
        """
        step = _Contexts.of(contexts, num_tokens)
        heads = self._heads(contexts, step)
        members, hidden = _members(heads)
        slots, begins = _stored(step, heads, members, hidden)
        ranges, query_rows = self._own_ranges(step, begins), step.query_rows
        if heads:
            ranges[members, KEY_BEGIN] = hidden  # rows have one range each, and come first
            ranges = np.concatenate([ranges, _shared_ranges(step, heads, begins, self._tile)])
            query_rows = np.concatenate([query_rows, members])
        parts = self._num_parts(ranges)
        of_query = np.repeat(parts, ranges[:, NUM_QUERIES])
        counts = np.empty(step.num_tokens, np.int64)  # of each token's partial results
        counts[step.query_rows] = of_query[: step.num_tokens]
        if heads:  # partial results over shared slots come first
            ranges[members, PARTIAL] = of_query[step.num_tokens :]
            counts[members] += of_query[step.num_tokens :]
        counts[counts == 1] = 0
        items = _longest_first(_split(ranges, parts))
        is_row = items[:, NUM_QUERIES] == 1
        return WorkItems(
            query_rows.astype(np.int32),
            slots,
            items[is_row],
            items[~is_row],
            _ends(counts).astype(np.int32),
        )

    def gain(self, contexts: Sequence[Context]) -> float:
        """Return the keys that shared slots save a step, less what partial results cost."""
        step = _Contexts.of(contexts, 0)
        return self._shared(contexts, step)[1]

    def _heads(self, contexts: Sequence[Context], step: "_Contexts") -> list[SharedHead]:
        """Return the slots that rows are to share."""
        if not self.may_share or not step.has_own:
            return []
        heads, gain = self._shared(contexts, step)
        return heads if gain > self._costs.fixed else []

    def _shared(self, contexts: Sequence[Context], step: "_Contexts") -> tuple[list[SharedHead], float]:
        num_keys = int(step.lengths[step.counts == 1].sum())
        return shared_heads(contexts, num_keys, self._tile, self._num_items, self._costs)

    def _own_ranges(self, step: "_Contexts", begins: Int64) -> Int64:
        """Return what tiles of each context's tokens attend to."""
        counts, lengths, tile = step.counts, step.lengths, self._tile
        tiles = -(-counts // tile)
        context = np.repeat(np.arange(len(counts)), tiles)
        before = (np.arange(len(context)) - (np.cumsum(tiles) - tiles)[context]) * tile
        ranges = np.zeros((len(context), NUM_COLUMNS), np.int64)
        ranges[:, QUERY_BEGIN] = (np.cumsum(counts) - counts)[context] + before
        ranges[:, NUM_QUERIES] = num_queries = np.minimum(counts[context] - before, tile)
        ranges[:, SLOTS_BEGIN] = begins[context]
        ranges[:, KEY_END] = length = lengths[context]
        if not step.has_own:
            ranges[:, FIRST_QUERY] = SEES_ALL
            return ranges
        ranges[:, FIRST_QUERY] = first = length - counts[context] + before
        if self._is_causal:
            ranges[:, KEY_END] = first + num_queries
        if self._window is not None:
            ranges[:, KEY_BEGIN] = np.maximum(first - self._window + 1, 0)
        return ranges

    def _num_parts(self, ranges: Int64) -> Int64:
        """Return in how many items each range is split.

        Rows are bound by the memory that they read: about `num_items` equal ones fill the device. Tiles of
        chunks compute, and leave many partial results: they are split only where they are few.
        """
        lengths = ranges[:, KEY_END] - ranges[:, KEY_BEGIN]
        is_chunk = (ranges[:, NUM_QUERIES] > 1) & (ranges[:, FIRST_QUERY] < SEES_ALL)
        if not is_chunk.any():
            return _parts(lengths, self._num_items, MIN_KEYS)
        parts = np.ones(len(lengths), np.int64)
        parts[~is_chunk] = _parts(lengths[~is_chunk], self._num_items, MIN_KEYS)
        if np.count_nonzero(is_chunk) < self._num_items // 2:
            parts[is_chunk] = _parts(lengths[is_chunk], self._num_items // 2, 2 * MIN_KEYS)
        return parts


class _Contexts(NamedTuple):
    """Lists of slots, and which tokens attend to each: the padding comes last."""

    slots: Sequence[Slots]  # without that of the padding
    lengths: Int64  # [C], of the lists
    counts: Int64  # [C], of tokens
    query_rows: Int64  # [T], the tokens of the first list, then those of the next
    num_padding: int  # lists of the one padding slot at the end
    has_own: bool

    @property
    def num_tokens(self) -> int:
        return len(self.query_rows)

    @classmethod
    def of(cls, contexts: Sequence[Context], num_tokens: int) -> "_Contexts":
        has_own = not contexts or contexts[0].has_own
        lists = [context.slots for context in contexts]
        counts = np.array([context.num_tokens for context in contexts], np.int64)
        total = int(counts.sum())
        num_padding = max(num_tokens - total, 0)
        query_rows = np.arange(total + num_padding)
        if not has_own:
            lists, counts, query_rows = _joined(lists, counts, query_rows)
        lengths = np.array([*map(len, lists)], np.int64)
        if num_padding:
            lists_of_padding, each = (num_padding, 1) if has_own else (1, num_padding)
            lengths = np.append(lengths, np.ones(lists_of_padding, np.int64))
            counts = np.append(counts, np.full(lists_of_padding, each))
            num_padding = lists_of_padding
        return cls(lists, lengths, counts, query_rows, num_padding, has_own)


def _joined(lists: Sequence[Slots], counts: Int64, query_rows: Int64) -> tuple[list[Slots], Int64, Int64]:
    """Bring the tokens that see the same list together: beams, samples and labels of a request."""
    numbers: dict[int, int] = {}
    places = np.array([numbers.setdefault(id(each), len(numbers)) for each in lists], np.int64)
    distinct = {id(each): each for each in lists}
    tokens = np.repeat(places, counts)
    order = np.argsort(tokens, kind="stable")
    query_rows = np.concatenate([order, query_rows[len(order) :]])
    return [*distinct.values()], np.bincount(tokens, minlength=len(distinct)), query_rows


def _members(heads: Sequence[SharedHead]) -> tuple[Int64, Int64]:
    """Return the rows of all heads, one head's after the other's, and how many slots each shares."""
    if not heads:
        return _NONE, _NONE
    rows = [*chain.from_iterable(head.rows for head in heads)]
    hidden = np.repeat([head.num_slots for head in heads], [len(head.rows) for head in heads])
    return np.array(rows), hidden


def _stored(
    step: _Contexts, heads: Sequence[SharedHead], members: Int64, hidden: Int64
) -> tuple[list[Slots], Int64]:
    """Return the lists as they stand in a row, and where there each context begins, then each head.

    Shared slots stand there once: the contexts begin before their first slot that does.
    """
    slots, num_lists = [*step.slots], len(step.slots)
    sizes = step.lengths[:num_lists]
    if heads:
        for rows, num_slots in heads:
            slots.append(slots[rows[0]][:num_slots])
            for row in rows:
                slots[row] = slots[row][num_slots:]
        sizes = np.concatenate([sizes, [head.num_slots for head in heads]])
        sizes[members] -= hidden
    begins = np.cumsum(sizes) - sizes
    begins[members] -= hidden
    if step.num_padding:
        slots.append(_PADDING)
        padding = np.full(step.num_padding, sizes.sum())
        begins = np.concatenate([begins[:num_lists], padding, begins[num_lists:]])
    return slots, begins


def _shared_ranges(step: _Contexts, heads: Sequence[SharedHead], begins: Int64, tile: int) -> Int64:
    """Return the ranges of shared slots. The tokens that attend to them follow all others."""
    counts, num_slots = np.array([(len(head.rows), head.num_slots) for head in heads]).T
    tiles = -(-counts // tile)
    head = np.repeat(np.arange(len(heads)), tiles)
    nth = np.arange(len(head)) - (np.cumsum(tiles) - tiles)[head]
    first, last = (counts[head] * each // tiles[head] for each in (nth, nth + 1))
    ranges = np.zeros((len(head), NUM_COLUMNS), np.int64)
    ranges[:, QUERY_BEGIN] = step.num_tokens + (np.cumsum(counts) - counts)[head] + first
    ranges[:, NUM_QUERIES] = last - first
    ranges[:, SLOTS_BEGIN] = begins[len(step.lengths) + head]
    ranges[:, KEY_END] = num_slots[head]
    ranges[:, FIRST_QUERY] = SEES_ALL
    return ranges


def _parts(lengths: Int64, num_items: int, min_keys: int) -> Int64:
    """Return in how many parts of `min_keys` or more to split ranges, for about `num_items` of one length."""
    size = max(min_keys, -(-int(lengths.sum()) // num_items))
    return np.minimum(-(-lengths // size), np.maximum(lengths // min_keys, 1))


def _split(ranges: Int64, parts: Int64) -> Int32:
    """Return the items of ranges, each cut in as many nearly equal parts."""
    number = np.repeat(np.arange(len(ranges)), parts)
    items = ranges[number]
    if len(items) > len(ranges):
        nth = np.arange(len(number)) - (np.cumsum(parts) - parts)[number]
        begin, end, num_parts = items[:, KEY_BEGIN].copy(), items[:, KEY_END], parts[number]
        units = -(-(end - begin) // _UNIT)
        items[:, KEY_BEGIN] = begin + units * nth // num_parts * _UNIT
        items[:, KEY_END] = np.minimum(begin + units * (nth + 1) // num_parts * _UNIT, end)
        items[:, PARTIAL] += nth
    return items.astype(np.int32)


def _longest_first(items: Int32) -> Int32:
    """Return the items in the order in which they begin: the last ones to end are short."""
    return items[np.argsort(items[:, KEY_BEGIN] - items[:, KEY_END], kind="stable")]


def _ends(counts: Int64) -> Int64:
    """Return where each of consecutive parts begins, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(counts)])
