// What attention is computed of, and the part of it that a thread does at once. See attention.cpp for shapes.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "vectors.h"

namespace {

constexpr int kLineHalves = 32;  // bf16 numbers in a cache line

// Some query tokens of one sequence and the heads of one group: they attend to the same K and V.
struct Task {
    int64_t item, kv_head, first, count;  // tokens [first, first + count) of the item
    // Items of one token each that begin with the same slots, `item` among them; empty: it is alone.
    std::vector<int64_t> members{};
    int64_t shared = 0;  // how many slots
};

// The slots of a task's item, by index from its first one.
struct Sight {
    const int64_t* slots;
    int64_t first;       // the index of the task's first token, where it has one
    int64_t begin, end;  // what any token of the task sees
};

struct Attention {
    const uint16_t* query;  // [T, H, D] by strides, D contiguous
    int64_t token_stride, head_stride;
    const uint16_t* keys;    // [S, Hk * D]
    const uint16_t* values;  // [S, Hk * Dv]
    uint16_t* out;           // [T, H, Dv]
    const int64_t* slots;        // of all items, one after the other
    const int64_t* slot_begin;   // [items + 1]
    const int64_t* token_begin;  // [items + 1]
    int64_t heads, kv_heads, width, value_width, window;
    bool is_causal;     // else every token sees every slot, and there is no window
    const float* bias;  // [H, 2 * reach + 1], added to scores by slot distance of key to query; null: none
    int64_t reach;      // distances beyond it count as this one
    float scale;        // positive

    int64_t group() const { return heads / kv_heads; }

    int64_t first_visible(int64_t slot) const { return window == 0 ? 0 : std::max<int64_t>(0, slot + 1 - window); }

    Sight sight(const Task& task) const {
        const int64_t length = slot_begin[task.item + 1] - slot_begin[task.item];
        const int64_t tokens = token_begin[task.item + 1] - token_begin[task.item];
        const int64_t first = length - tokens + task.first;
        return {slots + slot_begin[task.item], first, first_visible(first), is_causal ? first + task.count : length};
    }

    // Rows of a task are its tokens' heads, token by token.
    const uint16_t* query_of(const Task& task, int row) const {
        const int64_t token = token_begin[task.item] + task.first + row / group();
        return query + token * token_stride + (task.kv_head * group() + row % group()) * head_stride;
    }

    uint16_t* out_of(const Task& task, int row) const {
        const int64_t token = token_begin[task.item] + task.first + row / group();
        return out + (token * heads + task.kv_head * group() + row % group()) * value_width;
    }

    // Add a head's bias to scores of slots [at, at + count) by the query at `slot`: they pass the table's lowest
    // distance, then its numbers one by one, then its highest.
    void add_bias(int64_t head, int64_t slot, int64_t at, int count, float* __restrict scores) const {
        const float* __restrict numbers = bias + head * (2 * reach + 1);
        const int64_t low = std::clamp<int64_t>(slot - reach - at, 0, count);
        const int64_t high = std::clamp<int64_t>(slot + reach - at, low, count);
        const int64_t shift = at - slot + reach;
        for (int64_t i = 0; i < low; ++i) scores[i] += numbers[0];
        for (int64_t i = low; i < high; ++i) scores[i] += numbers[i + shift];
        for (int64_t i = high; i < count; ++i) scores[i] += numbers[2 * reach];
    }

    // Ask for the lines of slots [at, at + 16) of a pool early: slots lie anywhere, and the processor can't guess
    // which come next. Inline always: GCC drops calls of functions that only prefetch, as if they did nothing.
    __attribute__((always_inline)) void fetch(const uint16_t* pool, int64_t width, int64_t kv_head,
                                              const int64_t* slots, int at, int count) const {
        const int end = std::min(at + kLanes, count);
        for (; at < end; ++at) {
            const uint16_t* from = pool + (slots[at] * kv_heads + kv_head) * width;
            for (int64_t d = 0; d < width; d += kLineHalves) __builtin_prefetch(from + d);
        }
    }
};

}  // namespace
