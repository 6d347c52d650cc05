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


@triton.jit(do_not_specialize=["furthest", "window"])
def attend(
    items,  # [W, 8] int32
    query,  # [H, T, D], of any strides but 1 along D
    keys,  # [S, Hk * D]
    values,  # [S, Hk * Dv]
    output,  # [T, H, Dv]
    partial_output,  # [P, H, Dv] float32
    partial_maximum,  # [P, H] float32, of scores in powers of 2
    partial_sum,  # [P, H] float32
    query_rows,  # [Q] int32
    slots,  # [L] int32
    partial_begin,  # [T + 1] int32
    sinks,  # [H]; None without HAS_SINKS
    position_bias,  # [H, 2 * furthest + 1]; None without HAS_BIAS
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
    IS_CAUSAL: tl.constexpr,  # an item's queries see different keys
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
    # Latencies overlap: of all columns first, then of the first slots and the tokens, then of what they name.
    query_begin = tl.load(item)
    num_queries = tl.load(item + 1)
    listed = slots + tl.load(item + 2)
    key_begin = tl.load(item + 3)
    key_end = tl.load(item + 4)
    first_query = tl.load(item + 5)
    nth_partial = tl.load(item + 6)
    if num_queries == 0:
        return
    places = key_begin + tl.arange(0, BLOCK_N)
    next_slot = tl.load(listed + places, mask=places < key_end, other=0)
    number = tl.arange(0, BLOCK_M) // GROUP  # of a row's query token in the item
    is_row = number < num_queries
    token = tl.load(query_rows + query_begin + number, mask=is_row, other=0)
    num_heads = NUM_KV_HEADS * GROUP
    head = kv_head * GROUP + tl.arange(0, BLOCK_M) % GROUP
    at = head.to(tl.int64) * query_head_stride + token.to(tl.int64) * query_token_stride
    q = _load_tile(query, at, 0, is_row, KEY_DIM, BLOCK_D)
    first_partial = tl.load(partial_begin + token, mask=is_row, other=0)
    is_alone = tl.load(partial_begin + token + 1, mask=is_row, other=0) - first_partial <= 1
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulated = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    for begin in range(key_begin, key_end, BLOCK_N):
        places = begin + tl.arange(0, BLOCK_N)
        is_key = places < key_end
        slot = next_slot.to(tl.int64)
        next_slot = tl.load(listed + places + BLOCK_N, mask=places + BLOCK_N < key_end, other=0)
        k = _load_tile(keys, slot * (NUM_KV_HEADS * KEY_DIM), kv_head * KEY_DIM, is_key, KEY_DIM, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
        if HAS_SOFTCAP:
            scores = softcap * _tanh(scores / softcap)
        apart = places[None, :] - (first_query + number)[:, None]
        if HAS_BIAS:
            column = tl.minimum(tl.maximum(apart, -furthest), furthest) + furthest
            at_bias = position_bias + (head * (2 * furthest + 1))[:, None] + column
            scores += tl.load(at_bias, mask=is_row[:, None] & is_key[None, :], other=0.0).to(tl.float32)
        is_seen = is_key[None, :]
        if IS_CAUSAL:
            is_seen = is_seen & (apart <= 0)
            if HAS_WINDOW:
                is_seen = is_seen & ((apart > -window) | (first_query >= SEES_ALL))
        scores = tl.where(is_seen, scores * LOG2_E, float("-inf"))
        highest = tl.maximum(maximum, tl.max(scores, 1))
        reference = _finite(highest)
        weights = tl.exp2(scores - reference[:, None])
        kept = tl.exp2(maximum - reference)
        total = total * kept + tl.sum(weights, 1)
        v = _load_tile(
            values, slot * (NUM_KV_HEADS * VALUE_DIM), kv_head * VALUE_DIM, is_key, VALUE_DIM, BLOCK_DV
        )
        accumulated = accumulated * kept[:, None]
        accumulated = tl.dot(weights.to(v.dtype), v, accumulated, input_precision="ieee")
        maximum = highest

    is_partial = is_row & (is_alone == 0)
    at_partial = (first_partial + nth_partial).to(tl.int64) * num_heads + head
    tl.store(partial_maximum + at_partial, maximum, mask=is_partial)
    tl.store(partial_sum + at_partial, total, mask=is_partial)
    _store_tile(partial_output, at_partial, accumulated, is_partial, VALUE_DIM, BLOCK_DV)

    if HAS_SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2_E
        highest = tl.maximum(maximum, sink)
        kept = tl.exp2(maximum - highest)
        total = total * kept + tl.exp2(sink - highest)
        accumulated = accumulated * kept[:, None]
    final = accumulated / tl.where(total == 0.0, 1.0, total)[:, None]
    _store_tile(output, token.to(tl.int64) * num_heads + head, final, is_row & is_alone, VALUE_DIM, BLOCK_DV)


@triton.jit
def merge(
    partial_output,  # [P, H, Dv] float32
    partial_maximum,  # [P, H] float32
    partial_sum,  # [P, H] float32
    partial_begin,  # [T + 1] int32
    sinks,  # [H]; None without HAS_SINKS
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
    maximum = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    if HAS_SINKS:
        maximum = tl.full([1], 0.0, tl.float32) + tl.load(sinks + head).to(tl.float32) * LOG2_E
        total += 1.0
    accumulated = tl.zeros([BLOCK_DV], tl.float32)
    for begin in range(first, last, BLOCK_P):
        places = begin + tl.arange(0, BLOCK_P)
        is_partial = places < last
        at = places.to(tl.int64) * NUM_HEADS + head
        maxima = tl.load(partial_maximum + at, mask=is_partial, other=float("-inf"))
        sums = tl.load(partial_sum + at, mask=is_partial, other=0.0)
        outputs = _load_tile(partial_output, at * VALUE_DIM, 0, is_partial, VALUE_DIM, BLOCK_DV)
        highest = tl.maximum(maximum, tl.max(maxima, 0))
        reference = _finite(highest)
        kept = tl.exp2(maximum - reference)
        weights = tl.exp2(maxima - reference)
        total = total * kept + tl.sum(sums * weights, 0)
        accumulated = accumulated * kept + tl.sum(outputs * weights[:, None], 0)
        maximum = highest
    final = accumulated / tl.where(total == 0.0, 1.0, total)
    columns = tl.arange(0, BLOCK_DV)
    at_output = output + tl.program_id(0).to(tl.int64) * VALUE_DIM + columns
    tl.store(at_output, final.to(output.dtype.element_ty), mask=columns < VALUE_DIM)


@triton.jit
def _load_tile(base, offsets, first_column, is_row, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Load rows of `WIDTH` numbers, which begin at `offsets`. Whatever isn't there is 0, also beside NaN."""
    columns = tl.arange(0, BLOCK)
    is_number = is_row[:, None] & (columns < WIDTH)[None, :]
    return tl.load(base + offsets[:, None] + (first_column + columns)[None, :], mask=is_number, other=0.0)


@triton.jit
def _store_tile(base, rows, tile, is_row, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    is_number = is_row[:, None] & (columns < WIDTH)[None, :]
    at = base + (rows * WIDTH)[:, None] + columns[None, :]
    tl.store(at, tile.to(base.dtype.element_ty), mask=is_number)


@triton.jit
def _finite(maximum):
    """Return a maximum to subtract: a row that has seen no key has none, and -inf - -inf is NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _tanh(x):
    """Return the hyperbolic tangent, which has no name that both compiler and interpreter know."""
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)
