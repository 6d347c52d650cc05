// Attention of packed tokens over keys and values that lie in slots of a pool. See kernels.cpp for shapes.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "vectors.h"

namespace {

constexpr int kContextBlock = 256;  // context slots with scores held at once
constexpr int kRows = 56;           // query rows (tokens x heads of a group) that share a pass over K and V
constexpr int kRowsAtOnce = 8;      // of which so many are multiplied at once; divides kRows
constexpr int kFewRows = 2;         // up to so many are multiplied one by one
constexpr int kAhead = 2 * kLanes;  // how many slots ahead of their use keys are asked for
constexpr int kLineHalves = 32;     // bf16 numbers in a cache line

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
    float scale;
};

// Some query tokens of one sequence and the heads of one group: they attend to the same K and V.
struct Task {
    int64_t item, kv_head, first, count;  // tokens [first, first + count) of the item
};

// What a thread needs for a task; sized once.
struct Scratch {
    std::vector<float> query;   // [kRows / kRowsAtOnce, width, kRowsAtOnce], scaled; of few rows [rows, width]
    std::vector<float> keys;    // [width, kLanes]
    std::vector<float> values;  // [kLanes, value_width]
    std::vector<float> scores;  // [kRows, kContextBlock]
    std::vector<float> sums;    // [kRows, value_width]
    float most[kRows], weight[kRows];
    int begin[kRows], end[kRows];  // slots of the block that a row sees

    Scratch(int64_t width, int64_t value_width)
        : query(kRows * width),
          keys(width * kLanes),
          values(kLanes * value_width),
          scores(kRows * kContextBlock),
          sums(kRows * value_width) {}
};

class Worker {
  public:
    Worker(const Attention& given) : a(given), group(given.heads / given.kv_heads), s(given.width, given.value_width) {}

    void run(const Task& task) {
        const int64_t* slots = a.slots + a.slot_begin[task.item];
        const int64_t length = a.slot_begin[task.item + 1] - a.slot_begin[task.item];
        const int64_t tokens = a.token_begin[task.item + 1] - a.token_begin[task.item];
        const int64_t computed = length - tokens;  // slots that earlier steps filled
        const int64_t first = computed + task.first;  // the slot of the task's first token, where it has one
        rows = static_cast<int>(task.count * group);
        gather_queries(task);
        const int64_t begin = first_visible(first);
        const int64_t end = a.is_causal ? first + task.count : length;
        for (int64_t at = begin; at < end; at += kContextBlock) {
            const int count = static_cast<int>(std::min<int64_t>(kContextBlock, end - at));
            score(task.kv_head, slots + at, count);
            if (a.bias != nullptr) add_bias(task.kv_head, first, at, count);
            hide(first, at, count);
            weigh(count);
            add_values(task.kv_head, slots + at, count);
        }
        write(task);
    }

  private:
    const Attention& a;
    const int64_t group;
    Scratch s;
    int rows = 0;

    bool are_few() const { return rows <= kFewRows; }

    int64_t first_visible(int64_t slot) const {
        return a.window == 0 ? 0 : std::max<int64_t>(0, slot + 1 - a.window);
    }

    void gather_queries(const Task& task) {
        for (int row = 0; row < rows; ++row) {
            const int64_t token = a.token_begin[task.item] + task.first + row / group;
            const int64_t head = task.kv_head * group + row % group;
            const uint16_t* from = a.query + token * a.token_stride + head * a.head_stride;
            const int pitch = are_few() ? 1 : kRowsAtOnce;
            float* to = s.query.data() + row / pitch * pitch * a.width + row % pitch;
            for (int64_t d = 0; d < a.width; ++d) to[d * pitch] = to_float(from[d]) * a.scale;
        }
        std::fill(s.most, s.most + rows, kMinusInfinity);
        std::fill(s.weight, s.weight + rows, 0.0f);
        std::fill(s.sums.begin(), s.sums.begin() + rows * a.value_width, 0.0f);
    }

    // Scores of `count` slots, 16 at a time.
    void score(int64_t kv_head, const int64_t* slots, int count) {
        const int64_t pitch = a.kv_heads * a.width;
        for (int at = 0; at < kAhead; at += kLanes) fetch(a.keys, pitch, kv_head, a.width, slots, at, count);
        for (int at = 0; at < count; at += kLanes) {
            fetch(a.keys, pitch, kv_head, a.width, slots, at + kAhead, count);
            fetch(a.values, a.kv_heads * a.value_width, kv_head, a.value_width, slots, at, count);
            const uint16_t* key[kLanes];
            for (int lane = 0; lane < kLanes; ++lane) {
                // Beyond the last slot a lane repeats it; `hide` takes its score away.
                key[lane] = a.keys + slots[std::min(at + lane, count - 1)] * pitch + kv_head * a.width;
            }
            if (are_few()) {
                for (int row = 0; row < rows; ++row) score_row(row, key, at);
                continue;
            }
            turn(key);
            for (int row = 0; row < rows; row += kRowsAtOnce) score_rows(row, at);
        }
    }

    // For many rows K is turned, so that a vector holds one number of 16 slots.
    void turn(const uint16_t* const* key) {
        for (int64_t d = 0; d < a.width; d += kLanes) {
            Vector block[kLanes];
            for (int lane = 0; lane < kLanes; ++lane) block[lane] = load_halves(key[lane] + d);
            transpose(block);
            for (int lane = 0; lane < kLanes; ++lane) store(s.keys.data() + (d + lane) * kLanes, block[lane]);
        }
    }

    // For few rows it pays to turn the sums instead.
    void score_row(int row, const uint16_t* const* key, int at) {
        const float* query = s.query.data() + row * a.width;
        Vector sums[kLanes] = {};
        for (int64_t d = 0; d < a.width; d += kLanes) {
            const Vector numbers = load(query + d);
            for (int lane = 0; lane < kLanes; ++lane) sums[lane] += numbers * load_halves(key[lane] + d);
        }
        store(score_of(row) + at, totals(sums));
    }

    // Ask for 16 slots' lines early: slots lie anywhere, and the processor can't guess which come next.
    void fetch(const uint16_t* pool, int64_t pitch, int64_t kv_head, int64_t width, const int64_t* slots, int at,
               int count) const {
        const int end = std::min(at + kLanes, count);
        for (; at < end; ++at) {
            const uint16_t* from = pool + slots[at] * pitch + kv_head * width;
            for (int64_t d = 0; d < width; d += kLineHalves) __builtin_prefetch(from + d);
        }
    }

    // Rows beyond the last are computed too, for nothing: independent sums keep the multipliers busy.
    void score_rows(int row, int at) {
        Vector sums[kRowsAtOnce] = {};
        const float* query = s.query.data() + row * a.width;
        const float* keys = s.keys.data();
        for (int64_t d = 0; d < a.width; ++d, query += kRowsAtOnce, keys += kLanes) {
            const Vector key = load(keys);
            for (int each = 0; each < kRowsAtOnce; ++each) sums[each] += query[each] * key;
        }
        for (int each = 0; each < kRowsAtOnce; ++each) store(score_of(row + each) + at, sums[each]);
    }

    float* score_of(int row) { return s.scores.data() + row * kContextBlock; }

    // A row passes the table's lowest distance, then its numbers one by one, then its highest.
    void add_bias(int64_t kv_head, int64_t first_slot, int64_t at, int count) {
        for (int row = 0; row < rows; ++row) {
            const int64_t slot = first_slot + row / group;
            const float* __restrict numbers = a.bias + (kv_head * group + row % group) * (2 * a.reach + 1);
            const int64_t low = std::clamp<int64_t>(slot - a.reach - at, 0, count);
            const int64_t high = std::clamp<int64_t>(slot + a.reach - at, low, count);
            const int64_t shift = at - slot + a.reach;
            float* __restrict scores = score_of(row);
            for (int64_t i = 0; i < low; ++i) scores[i] += numbers[0];
            for (int64_t i = low; i < high; ++i) scores[i] += numbers[i + shift];
            for (int64_t i = high; i < count; ++i) scores[i] += numbers[2 * a.reach];
        }
    }

    // Causality, the window, and the lanes that fill up the last vector.
    void hide(int64_t first_slot, int64_t at, int count) {
        const int padded = (count + kLanes - 1) / kLanes * kLanes;
        for (int row = 0; row < rows; ++row) {
            const int64_t slot = first_slot + row / group;
            const int64_t begin = std::clamp<int64_t>(first_visible(slot) - at, 0, count);
            const int64_t end = a.is_causal ? std::clamp<int64_t>(slot + 1 - at, begin, count) : count;
            std::fill(score_of(row), score_of(row) + begin, kMinusInfinity);
            std::fill(score_of(row) + end, score_of(row) + padded, kMinusInfinity);
            s.begin[row] = static_cast<int>(begin);
            s.end[row] = static_cast<int>(end);
        }
    }

    // Scores become weights relative to the largest so far; what was summed before is scaled down to it.
    void weigh(int count) {
        for (int row = 0; row < rows; ++row) {
            float* scores = score_of(row);
            Vector most = load(scores);
            for (int at = kLanes; at < count; at += kLanes) {
                const Vector other = load(scores + at);
                most = other > most ? other : most;
            }
            const float before = s.most[row];
            const float now = std::max(before, largest(most));
            // Nothing of this block is visible to the row, nor was anything before.
            const float base = now == kMinusInfinity ? 0.0f : now;
            Vector sum{};
            for (int at = 0; at < count; at += kLanes) {
                const Vector raw = load(scores + at);
                // A hidden slot weighs nothing at all, so that no amount of them adds up to something.
                const Vector weights = raw == kMinusInfinity ? Vector{} : exponential(raw - base);
                store(scores + at, weights);
                sum += weights;
            }
            const float shrink = before == kMinusInfinity ? 0.0f : std::exp(before - base);
            s.weight[row] = s.weight[row] * shrink + total(sum);
            s.most[row] = now;
            float* sums = s.sums.data() + row * a.value_width;
            if (shrink != 1.0f) {
                for (int64_t d = 0; d < a.value_width; ++d) sums[d] *= shrink;
            }
        }
    }

    void add_values(int64_t kv_head, const int64_t* slots, int count) {
        const int64_t pitch = a.kv_heads * a.value_width;
        if (are_few()) {
            for (int row = 0; row < rows; ++row) add_row_in_place(row, slots, pitch, kv_head * a.value_width);
            return;
        }
        for (int at = 0; at < count; at += kLanes) {
            const int present = std::min(kLanes, count - at);
            for (int lane = 0; lane < present; ++lane) {
                const uint16_t* value = a.values + slots[at + lane] * pitch + kv_head * a.value_width;
                float* to = s.values.data() + lane * a.value_width;
                for (int64_t d = 0; d < a.value_width; d += kLanes) store(to + d, load_halves(value + d));
            }
            for (int row = 0; row < rows; ++row) add_row(row, at);
        }
    }

    // 0 x NaN is NaN: a slot that the row doesn't see is left out, not multiplied by 0.
    void add_row(int row, int at) {
        const int begin = std::max(s.begin[row] - at, 0), end = std::min(s.end[row] - at, kLanes);
        const float* weights = score_of(row) + at;
        float* sums = s.sums.data() + row * a.value_width;
        int64_t d = 0;
        for (; d + 4 * kLanes <= a.value_width; d += 4 * kLanes) add_columns<4>(weights, sums + d, d, begin, end);
        for (; d < a.value_width; d += kLanes) add_columns<1>(weights, sums + d, d, begin, end);
    }

    // Few rows take values from where they lie.
    void add_row_in_place(int row, const int64_t* slots, int64_t pitch, int64_t offset) {
        float* sums = s.sums.data() + row * a.value_width;
        int64_t d = 0;
        for (; d + 4 * kLanes <= a.value_width; d += 4 * kLanes) {
            add_columns_in_place<4>(row, slots, pitch, offset + d, sums + d);
        }
        for (; d < a.value_width; d += kLanes) add_columns_in_place<1>(row, slots, pitch, offset + d, sums + d);
    }

    template <int kCount>
    void add_columns_in_place(int row, const int64_t* slots, int64_t pitch, int64_t offset, float* to) {
        const float* weights = score_of(row);
        Vector sums[kCount];
        for (int each = 0; each < kCount; ++each) sums[each] = load(to + each * kLanes);
        for (int at = s.begin[row]; at < s.end[row]; ++at) {
            const uint16_t* value = a.values + slots[at] * pitch + offset;
            for (int each = 0; each < kCount; ++each) sums[each] += weights[at] * load_halves(value + each * kLanes);
        }
        for (int each = 0; each < kCount; ++each) store(to + each * kLanes, sums[each]);
    }

    template <int kCount>
    void add_columns(const float* weights, float* to, int64_t d, int begin, int end) {
        Vector sums[kCount];
        for (int each = 0; each < kCount; ++each) sums[each] = load(to + each * kLanes);
        const float* value = s.values.data() + begin * a.value_width + d;
        for (int lane = begin; lane < end; ++lane, value += a.value_width) {
            for (int each = 0; each < kCount; ++each) sums[each] += weights[lane] * load(value + each * kLanes);
        }
        for (int each = 0; each < kCount; ++each) store(to + each * kLanes, sums[each]);
    }

    void write(const Task& task) {
        for (int row = 0; row < rows; ++row) {
            const int64_t token = a.token_begin[task.item] + task.first + row / group;
            const int64_t head = task.kv_head * group + row % group;
            uint16_t* to = a.out + (token * a.heads + head) * a.value_width;
            const float* sums = s.sums.data() + row * a.value_width;
            for (int64_t d = 0; d < a.value_width; d += kLanes) store_halves(to + d, load(sums + d) / s.weight[row]);
        }
    }
};

}  // namespace
