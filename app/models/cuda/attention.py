"""Attention over work items, and the merge of partial results, as Triton kernels.

One program computes one item (a few query tokens, a range of a list of slots) for one kv head. Queries of all
heads of the kv head are rows of one tile, so that each key and value is read once for all of them. Softmax
runs in float32 over blocks of keys. A token with one item gets its output at once. Of a token with several,
each item leaves maximum, sum and unnormalised output, and the second kernel merges them: exact, since the
maximum that a partial result was scaled by is known.

Shapes: T packed tokens, H query heads, Hk kv heads, G = H / Hk queries per kv head, S slots of the pools,
D key width, Dv value width, M rows and N keys of a tile, P partial results.
Sources: FlashAttention-2 (Dao 2023), Flash-Decoding (Dao, Haziza, Massa, Sizov 2023), cascades by merged
partial results (Ye et al., FlashInfer 2024).
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
COLUMNS = tl.constexpr(8)  # app/models/attention/work_items.py: NUM_COLUMNS
SEES_ALL = tl.constexpr(1 << 30)  # there too


@triton.jit
def tanh(x):
    """Return the hyperbolic tangent, which has no name that both compiler and interpreter know."""
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def attend(
    query,  # [H, T, D], of any strides but 1 along D
    keys,  # [S, Hk * D]
    values,  # [S, Hk * Dv]
    output,  # [T, H, Dv]
    partial_output,  # [P, H, Dv] float32
    partial_maximum,  # [P, H] float32, of scores in powers of 2
    partial_sum,  # [P, H] float32
    query_rows,  # [Q] int32
    slots,  # [L] int32
    items,  # [W, 8] int32
    partial_begin,  # [T + 1] int32
    sinks,  # [H]; not read without HAS_SINKS
    position_bias,  # [H, 2 * furthest + 1]; not read without HAS_BIAS
    query_head_stride,
    query_token_stride,
    furthest,
    scaling,
    softcap,
    window,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    IS_CAUSAL: tl.constexpr,  # queries of an item see different keys
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Compute one item for one kv head: program `item * Hk + kv head`, so that neighbours share slots."""
    kv_head = tl.program_id(0) % NUM_KV_HEADS
    item = items + (tl.program_id(0) // NUM_KV_HEADS) * COLUMNS
    num_queries = tl.load(item + 1)
    if num_queries == 0:
        return
    query_begin = tl.load(item)
    listed = slots + tl.load(item + 2)
    key_begin = tl.load(item + 3)
    key_end = tl.load(item + 4)
    first_query = tl.load(item + 5)

    rows = tl.arange(0, BLOCK_M)
    number = rows // GROUP  # of the row's query token in the item
    is_row = number < num_queries
    head = kv_head * GROUP + rows % GROUP
    token = tl.load(query_rows + query_begin + number, mask=is_row, other=0)
    key_columns = tl.arange(0, BLOCK_D)
    value_columns = tl.arange(0, BLOCK_DV)
    at = head.to(tl.int64) * query_head_stride + token.to(tl.int64) * query_token_stride
    q = tl.load(
        query + at[:, None] + key_columns[None, :],
        mask=is_row[:, None] & (key_columns < KEY_DIM)[None, :],
        other=0.0,
    )
    last_key = first_query + number
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulated = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    for begin in range(key_begin, key_end, BLOCK_N):
        places = begin + tl.arange(0, BLOCK_N)
        is_key = places < key_end
        slot = tl.load(listed + places, mask=is_key, other=0).to(tl.int64)
        k = tl.load(
            keys + (slot * (NUM_KV_HEADS * KEY_DIM))[:, None] + (kv_head * KEY_DIM + key_columns)[None, :],
            mask=is_key[:, None] & (key_columns < KEY_DIM)[None, :],
            other=0.0,
        )
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
        if HAS_SOFTCAP:
            scores = softcap * tanh(scores / softcap)
        if HAS_BIAS:
            distance = places[None, :] - last_key[:, None]
            distance = tl.minimum(tl.maximum(distance, -furthest), furthest) + furthest
            at_bias = position_bias + (head * (2 * furthest + 1))[:, None] + distance
            scores += tl.load(at_bias, mask=is_row[:, None] & is_key[None, :], other=0.0).to(tl.float32)
        is_seen = is_key[None, :]
        if IS_CAUSAL:
            is_seen = is_seen & (places[None, :] <= last_key[:, None])
            if HAS_WINDOW:
                is_near = places[None, :] > last_key[:, None] - window
                is_seen = is_seen & (is_near | (first_query >= SEES_ALL))
        scores = tl.where(is_seen, scores * LOG2_E, float("-inf"))

        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        # A row that has seen no key yet has no maximum: -inf - -inf is NaN.
        reference = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.exp2(scores - reference[:, None])
        kept = tl.exp2(maximum - reference)
        total = total * kept + tl.sum(weights, 1)
        v = tl.load(
            values
            + (slot * (NUM_KV_HEADS * VALUE_DIM))[:, None]
            + (kv_head * VALUE_DIM + value_columns)[None, :],
            mask=is_key[:, None] & (value_columns < VALUE_DIM)[None, :],
            other=0.0,
        )
        accumulated = accumulated * kept[:, None]
        accumulated = tl.dot(weights.to(v.dtype), v, accumulated, input_precision="ieee")
        maximum = new_maximum

    partials = tl.load(partial_begin + token, mask=is_row, other=0)
    is_alone = tl.load(partial_begin + token + 1, mask=is_row, other=0) - partials <= 1
    columns = (value_columns < VALUE_DIM)[None, :]
    num_heads = NUM_KV_HEADS * GROUP

    is_partial = is_row & (is_alone == 0)
    partial = (partials + tl.load(item + 6)).to(tl.int64) * num_heads + head
    tl.store(partial_maximum + partial, maximum, mask=is_partial)
    tl.store(partial_sum + partial, total, mask=is_partial)
    at_partial = partial_output + partial[:, None] * VALUE_DIM + value_columns[None, :]
    tl.store(at_partial, accumulated, mask=is_partial[:, None] & columns)

    is_final = is_row & is_alone
    if HAS_SINKS:
        sink = tl.load(sinks + head, mask=is_final, other=0.0).to(tl.float32) * LOG2_E
        new_maximum = tl.maximum(maximum, sink)
        kept = tl.exp2(maximum - new_maximum)
        total = total * kept + tl.exp2(sink - new_maximum)
        accumulated = accumulated * kept[:, None]
    final = accumulated / tl.where(total == 0.0, 1.0, total)[:, None]
    at_output = (token.to(tl.int64) * num_heads + head)[:, None] * VALUE_DIM + value_columns[None, :]
    tl.store(output + at_output, final.to(output.dtype.element_ty), mask=is_final[:, None] & columns)


@triton.jit
def merge(
    partial_output,  # [P, H, Dv] float32
    partial_maximum,  # [P, H] float32
    partial_sum,  # [P, H] float32
    partial_begin,  # [T + 1] int32
    sinks,  # [H]; not read without HAS_SINKS
    output,  # [T, H, Dv]
    NUM_HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Merge the partial results of one token and head: program `token * H + head`."""
    token = tl.program_id(0) // NUM_HEADS
    head = tl.program_id(0) % NUM_HEADS
    first = tl.load(partial_begin + token)
    last = tl.load(partial_begin + token + 1)
    if last - first <= 1:
        return
    columns = tl.arange(0, BLOCK_DV)
    maximum = float("-inf")
    total = 0.0
    if HAS_SINKS:
        maximum = tl.load(sinks + head).to(tl.float32) * LOG2_E
        total = 1.0
    accumulated = tl.zeros([BLOCK_DV], tl.float32)
    for begin in range(first, last, BLOCK_P):
        places = begin + tl.arange(0, BLOCK_P)
        is_partial = places < last
        at = places.to(tl.int64) * NUM_HEADS + head
        maxima = tl.load(partial_maximum + at, mask=is_partial, other=float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(maxima, 0))
        reference = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        kept = tl.exp2(maximum - reference)
        weights = tl.exp2(maxima - reference)
        sums = tl.load(partial_sum + at, mask=is_partial, other=0.0)
        outputs = tl.load(
            partial_output + at[:, None] * VALUE_DIM + columns[None, :],
            mask=is_partial[:, None] & (columns < VALUE_DIM)[None, :],
            other=0.0,
        )
        total = total * kept + tl.sum(sums * weights, 0)
        accumulated = accumulated * kept + tl.sum(outputs * weights[:, None], 0)
        maximum = new_maximum
    final = accumulated / tl.where(total == 0.0, 1.0, total)
    at_output = output + tl.program_id(0).to(tl.int64) * VALUE_DIM + columns
    tl.store(at_output, final.to(output.dtype.element_ty), mask=columns < VALUE_DIM)
