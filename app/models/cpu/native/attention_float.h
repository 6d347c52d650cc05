// Attention in float vectors, for any processor; and for few rows, which want no packing.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "attention_task.h"
#include "vectors.h"

namespace {

constexpr int kContextBlock = 256;  // context slots with scores held at once
constexpr int kRows = 56;           // query rows (tokens x heads of a group) that share a pass over K and V
constexpr int kRowsAtOnce = 8;      // of which so many are multiplied at once; divides kRows
constexpr int kFewRows = 2;         // up to so many are multiplied one by one
constexpr int kAhead = 2 * kLanes;  // how many slots ahead of their use keys are asked for

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

class FloatWorker {
  public:
    explicit FloatWorker(const Attention& given) : a(given), group(given.group()), s(given.width, given.value_width) {}

    void run(const Task& task) {
        const Sight sight = a.sight(task);
        rows = static_cast<int>(task.count * group);
        gather_queries(task);
        for (int64_t at = sight.begin; at < sight.end; at += kContextBlock) {
            const int count = static_cast<int>(std::min<int64_t>(kContextBlock, sight.end - at));
            score(task.kv_head, sight.slots + at, count);
            if (a.bias != nullptr) add_bias(task.kv_head, sight.first, at, count);
            hide(sight.first, at, count);
            weigh(count);
            add_values(task.kv_head, sight.slots + at, count);
        }
        write(task);
    }

  private:
    const Attention& a;
    const int64_t group;
    Scratch s;
    int rows = 0;

    bool are_few() const { return rows <= kFewRows; }

    void gather_queries(const Task& task) {
        for (int row = 0; row < rows; ++row) {
            const uint16_t* from = a.query_of(task, row);
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
        for (int at = 0; at < kAhead; at += kLanes) a.fetch(a.keys, a.width, kv_head, slots, at, count);
        for (int at = 0; at < count; at += kLanes) {
            a.fetch(a.keys, a.width, kv_head, slots, at + kAhead, count);
            a.fetch(a.values, a.value_width, kv_head, slots, at, count);
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

    void add_bias(int64_t kv_head, int64_t first_slot, int64_t at, int count) {
        for (int row = 0; row < rows; ++row) {
            a.add_bias(kv_head * group + row % group, first_slot + row / group, at, count, score_of(row));
        }
    }

    // Causality, the window, and the lanes that fill up the last vector.
    void hide(int64_t first_slot, int64_t at, int count) {
        const int padded = (count + kLanes - 1) / kLanes * kLanes;
        for (int row = 0; row < rows; ++row) {
            const int64_t slot = first_slot + row / group;
            const int64_t begin = std::clamp<int64_t>(a.first_visible(slot) - at, 0, count);
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
            uint16_t* to = a.out_of(task, row);
            const float* sums = s.sums.data() + row * a.value_width;
            for (int64_t d = 0; d < a.value_width; d += kLanes) store_halves(to + d, load(sums + d) / s.weight[row]);
        }
    }
};

}  // namespace
