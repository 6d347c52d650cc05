"""A step's attention as work items: which query tokens attend to which part of a list of slots.

The kernels for GPUs (app/models/cuda/) run one program for each item and kv head. Decode rows with long
contexts are split in several items; a chunk's queries are cut in tiles; rows that share a long prefix may be
one item over it. Where a token has several items, their partial results are merged.

Shapes: T tokens of the packed row, Q query tokens of all items, L slots of all contexts, W items.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]

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


class WorkItems(NamedTuple):
    """All that the kernels need to know of a step in one KV group."""

    query_rows: Int32  # [Q], places in the packed row
    slots: Int32  # [L], of the pools
    items: Int32  # [W, NUM_COLUMNS]
    # [T + 1]: which partial results are a token's, at least two; none: its only item gives the final result.
    partial_begin: Int32
