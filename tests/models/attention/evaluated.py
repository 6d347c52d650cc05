"""Attention over work items by plain numpy: what the kernels are to compute."""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from app.models.attention.item_layouts import TritonLayout
from app.models.attention.work_items import (
    FIRST_QUERY,
    KEY_BEGIN,
    KEY_END,
    NUM_QUERIES,
    PARTIAL,
    QUERY_BEGIN,
    SEES_ALL,
    SLOTS_BEGIN,
)
from app.prompt import LayerGeometry

Floats = NDArray[np.float64]


def evaluated(
    layout: TritonLayout, geometry: LayerGeometry, query: Floats, pools: tuple[Floats, Floats]
) -> Floats:
    """Return attention `[T, H, Dv]` of `query [H, T, D]` over pools `[S, Hk * D]` and `[S, Hk * Dv]`.

    What no item computes is NaN.
    """
    heads, num_tokens, _ = query.shape
    keys, values = (
        np.repeat(pool.reshape(len(pool), geometry.num_kv_heads, -1), geometry.queries_per_kv, axis=1)
        for pool in pools
    )
    output = np.full((num_tokens, heads, values.shape[2]), np.nan)
    sums = np.full((layout.num_partials, heads), np.nan)
    partials = np.full((layout.num_partials, heads, values.shape[2]), np.nan)
    query_rows, slots, partial_begin = (
        each.numpy() for each in (layout.query_rows, layout.slots, layout.partial_begin)
    )
    for item in [*layout.row_items.numpy(), *layout.tile_items.numpy()]:
        for number, row in enumerate(query_rows[item[QUERY_BEGIN] :][: item[NUM_QUERIES]].tolist()):
            seen = np.arange(item[KEY_BEGIN], item[KEY_END])
            at = item[FIRST_QUERY] + number
            if geometry.is_causal and item[NUM_QUERIES] > 1 and item[FIRST_QUERY] < SEES_ALL:
                seen = seen[(seen <= at) & (seen > at - (geometry.window or SEES_ALL))]
            read = slots[item[SLOTS_BEGIN] + seen]
            weights = np.exp(np.einsum("hd,khd->kh", query[:, row], keys[read]))
            accumulated = np.einsum("kh,khd->hd", weights, values[read])
            if partial_begin[row] == partial_begin[row + 1]:
                output[row] = accumulated / weights.sum(axis=0)[:, None]
            else:
                place = partial_begin[row] + item[PARTIAL]
                assert np.isnan(sums[place]).all(), "two items compute the same partial result"
                sums[place], partials[place] = weights.sum(axis=0), accumulated
    for row, (begin, end) in enumerate(pairwise(partial_begin.tolist())):
        if end > begin:
            output[row] = partials[begin:end].sum(axis=0) / sums[begin:end].sum(axis=0)[:, None]
    return output
