// Attention on bf16 multipliers, for tasks of more than a few rows.
//
// Blocks of K and V are packed once for all rows of a task; rows then pass over a block in steps. Queries, keys,
// values and weights are bf16, sums and the running maximum float.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#include "attention_products.h"
#include "attention_task.h"
#include "vectors.h"

#if PROMPTPLEX_BF16_ATTENTION

namespace {

constexpr int kBlock = 128;  // context slots that are packed at once
constexpr int kPair = 2 * kLanes;
constexpr int kFetched = 2 * kLanes;  // how many slots ahead of their use keys are asked for

inline int64_t round_up(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

// Memory that grows, on cache lines, and keeps nothing when it does.
template <class Number>
class Buffer {
  public:
    Number* at_least(int64_t count) {
        if (count > size) {
            memory.reset(static_cast<Number*>(::operator new(count * sizeof(Number), kLine)));
            size = count;
        }
        return memory.get();
    }

  private:
    static constexpr std::align_val_t kLine{64};
    struct Free {
        void operator()(Number* numbers) const { ::operator delete(numbers, kLine); }
    };
    std::unique_ptr<Number, Free> memory;
    int64_t size = 0;
};

// 2^x for x <= 0, within 3e-6 of it; 0 below the smallest float, also of minus infinity. NaN stays NaN.
inline __m512 power_of_two(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);
    const __m512 rest = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // in [0, 1)
    __m512 sum = _mm512_set1_ps(0.0135341635f);
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.0520114717f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.241442748f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.693003837f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.00000259f));
    return _mm512_scalef_ps(sum, x);
}

// Query rows, and what they have summed so far.
struct Rows {
    uint16_t* query;  // [rows, width to 32]
    float* sums;      // [rows, value_width]
    float* totals;    // [rows, 16], of weights, by lane
    float* most;      // [rows], times log2(e)
    int count;
};

struct RowsMemory {
    Buffer<uint16_t> query;
    Buffer<float> sums, totals, most;

    // Rows up to `padded` are there too, and are nothing.
    Rows rows(int count, int64_t padded, int64_t depth, int64_t value_width) {
        const Rows rows{query.at_least(padded * depth), sums.at_least(padded * value_width),
                        totals.at_least(padded * kLanes), most.at_least(padded), count};
        std::fill(rows.query, rows.query + padded * depth, static_cast<uint16_t>(0));
        std::fill(rows.sums, rows.sums + padded * value_width, 0.0f);
        std::fill(rows.totals, rows.totals + padded * kLanes, 0.0f);
        std::fill(rows.most, rows.most + padded, kMinusInfinity);
        return rows;
    }
};

// A thread keeps its memory from task to task and from layer to layer.
struct Bf16Scratch {
    Buffer<uint16_t> keys;     // [kBlock / 16, width to 32 / 2, 16, 2]
    Buffer<uint16_t> values;   // [value_width / 16, kBlock / 2, 16, 2]
    Buffer<float> scores;      // [step, kBlock]
    Buffer<uint16_t> weights;  // [step, kBlock]
    RowsMemory own, shared;

    static Bf16Scratch& of_thread() {
        static thread_local Bf16Scratch scratch;
        return scratch;
    }
};

template <class Products>
class Bf16Worker {
  public:
    explicit Bf16Worker(const Attention& given)
        : a(given),
          s(Bf16Scratch::of_thread()),
          group(given.group()),
          depth(round_up(given.width, kDepth)),
          panels(static_cast<int>(given.value_width / kLanes)),
          keys(s.keys.at_least(kBlock * depth)),
          values(s.values.at_least(kBlock * a.value_width)),
          scores(s.scores.at_least(Products::kStep * kBlock)),
          weights(s.weights.at_least(Products::kStep * kBlock)) {}

    void run(const Task& task) {
        Products::begin();
        if (task.members.empty()) {
            const Sight sight = a.sight(task);
            const Rows rows = rows_of(s.own, static_cast<int>(task.count));
            gather_queries(task, rows.query);
            pass(task.kv_head, rows, sight, sight.begin);
            write(task, rows);
        } else {
            run_members(task);
        }
        Products::end();
    }

  private:
    const Attention& a;
    Bf16Scratch& s;
    const int64_t group;
    const int64_t depth;  // the width of queries and keys, padded with zeros
    const int panels;
    uint16_t *keys, *values;
    float* scores;
    uint16_t* weights;

    // Slots of the block, by index from its first.
    struct Range {
        int begin, end;
    };

    // All members' rows pass over what they share, then each one's over its own slots.
    void run_members(const Task& task) {
        const Rows all = rows_of(s.shared, static_cast<int>(task.members.size()));
        Task member{0, task.kv_head, 0, 1};
        const auto first_row = [this](size_t number) { return static_cast<int64_t>(number) * group; };
        for (size_t number = 0; number < task.members.size(); ++number) {
            member.item = task.members[number];
            gather_queries(member, all.query + first_row(number) * depth);
        }
        // To the shared slots every row is a later token.
        pass(task.kv_head, all, {a.sight(member).slots, task.shared, 0, task.shared}, 0);
        for (size_t number = 0; number < task.members.size(); ++number) {
            member.item = task.members[number];
            const Rows own = rows_of(s.own, 1);
            const int64_t row = first_row(number);
            std::copy_n(all.query + row * depth, group * depth, own.query);
            std::copy_n(all.sums + row * a.value_width, group * a.value_width, own.sums);
            std::copy_n(all.totals + row * kLanes, group * kLanes, own.totals);
            std::copy_n(all.most + row, group, own.most);
            pass(task.kv_head, own, a.sight(member), task.shared);
            write(member, own);
        }
    }

    Rows rows_of(RowsMemory& memory, int tokens) const {
        const int count = tokens * static_cast<int>(group);
        return memory.rows(count, round_up(count, Products::kStep), depth, a.value_width);
    }

    void gather_queries(const Task& task, uint16_t* to) const {
        for (int row = 0; row < task.count * group; ++row, to += depth) std::copy_n(a.query_of(task, row), a.width, to);
    }

    // All rows over slots [begin, sight.end).
    void pass(int64_t kv_head, const Rows& rows, const Sight& sight, int64_t begin) {
        for (int64_t at = begin; at < sight.end; at += kBlock) {
            const int count = static_cast<int>(std::min<int64_t>(kBlock, sight.end - at));
            pack_keys(kv_head, sight.slots + at, count);
            pack_values(kv_head, sight.slots + at, count);
            for (int row = 0; row < rows.count; row += Products::kStep) {
                attend(kv_head, rows, sight.first, row, at, count);
            }
        }
    }

    // 16 slots to a panel: a transposition of pairs. Beyond the last slot a lane repeats it.
    void pack_keys(int64_t kv_head, const int64_t* slots, int count) {
        for (int at = 0; at < kFetched; at += kLanes) a.fetch(a.keys, a.width, kv_head, slots, at, count);
        for (int at = 0; at < round_up(count, kPair); at += kLanes) {
            a.fetch(a.keys, a.width, kv_head, slots, at + kFetched, count);
            a.fetch(a.values, a.value_width, kv_head, slots, at, count);
            const uint16_t* key[kLanes];
            for (int lane = 0; lane < kLanes; ++lane) {
                key[lane] = a.keys + (slots[std::min(at + lane, count - 1)] * a.kv_heads + kv_head) * a.width;
            }
            for (int64_t d = 0; d < depth; d += kDepth) {
                const bool is_whole = d + kDepth <= a.width;
                Vector block[kLanes] = {};
                for (int lane = 0; lane < kLanes; ++lane) {
                    if (is_whole) {
                        std::memcpy(&block[lane], key[lane] + d, kDepth * sizeof(uint16_t));
                    } else {
                        std::memcpy(&block[lane], key[lane] + d, kDepth / 2 * sizeof(uint16_t));
                    }
                }
                transpose(block);
                float* to = reinterpret_cast<float*>(keys + at * depth + d * kLanes);
                for (int lane = 0; lane < kLanes; ++lane) store(to + lane * kLanes, block[lane]);
            }
        }
    }

    // Neighbouring slots' numbers side by side; slots beyond the last are zeros.
    void pack_values(int64_t kv_head, const int64_t* slots, int count) {
        const int padded = static_cast<int>(round_up(count, kPair));
        for (int at = 0; at < padded; at += 2) {
            const uint16_t* even = at < count ? value_of(kv_head, slots[at]) : nullptr;
            const uint16_t* odd = at + 1 < count ? value_of(kv_head, slots[at + 1]) : nullptr;
            for (int panel = 0; panel < panels; ++panel) {
                const __m512i low = widened(even, panel), high = widened(odd, panel);
                void* to = values + (panel * kBlock + at) * kLanes;
                _mm512_store_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
            }
        }
    }

    const uint16_t* value_of(int64_t kv_head, int64_t slot) const {
        return a.values + (slot * a.kv_heads + kv_head) * a.value_width;
    }

    static __m512i widened(const uint16_t* value, int panel) {
        if (value == nullptr) return _mm512_setzero_si512();
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(value + panel * kLanes)));
    }

    // A step of rows over the block at slot index `at`: only over what any of them sees.
    void attend(int64_t kv_head, const Rows& rows, int64_t first, int row, int64_t at, int count) {
        const int last = std::min(row + Products::kStep, rows.count) - 1;
        const Range head = seen(first, row, at, count), tail = seen(first, last, at, count);
        const Range seen_by_any{head.begin / kPair * kPair, static_cast<int>(round_up(tail.end, kPair))};
        if (seen_by_any.begin >= seen_by_any.end) return;
        multiply_queries(rows, row, seen_by_any);
        for (int each = row; each <= last; ++each) {
            const Range own = seen(first, each, at, count);
            float* of_row = scores + (each - row) * kBlock;
            float factor = a.scale * kLog2E;
            if (a.bias != nullptr) {
                for (int i = seen_by_any.begin; i < seen_by_any.end; ++i) of_row[i] *= a.scale;
                a.add_bias(kv_head * group + each % group, first + each / group, at, count, of_row);
                factor = kLog2E;
            }
            std::fill(of_row + seen_by_any.begin, of_row + own.begin, kMinusInfinity);
            std::fill(of_row + own.end, of_row + seen_by_any.end, kMinusInfinity);
            weigh(rows, each, of_row, weights + (each - row) * kBlock, seen_by_any, factor);
        }
        const bool see_the_same = tail.begin <= seen_by_any.begin && head.end >= std::min(count, seen_by_any.end);
        if (see_the_same || are_finite(seen_by_any)) {
            multiply_weights(rows, row, seen_by_any);
        } else {
            for (int each = row; each <= last; ++each) {
                add_what_is_seen(rows.sums + each * a.value_width, each - row, seen(first, each, at, count));
            }
        }
    }

    Range seen(int64_t first, int row, int64_t at, int count) const {
        const int64_t slot = first + row / group;
        const int64_t begin = std::clamp<int64_t>(a.first_visible(slot) - at, 0, count);
        const int64_t end = a.is_causal ? std::clamp<int64_t>(slot + 1 - at, begin, count) : count;
        return {static_cast<int>(begin), static_cast<int>(end)};
    }

    void multiply_queries(const Rows& rows, int row, Range range) {
        const Product product{rows.query + row * depth, depth, keys + range.begin * depth, kLanes * depth, depth,
                              scores + range.begin, kBlock, false};
        multiply_panels<Products>(product, (range.end - range.begin) / kLanes);
    }

    void multiply_weights(const Rows& rows, int row, Range range) {
        const Product product{weights + range.begin, kBlock, values + range.begin * kLanes, kBlock * kLanes,
                              range.end - range.begin, rows.sums + row * a.value_width, a.value_width, true};
        multiply_panels<Products>(product, panels);
    }

    // Scores become weights relative to the largest so far; what was summed before is scaled down to it.
    void weigh(const Rows& rows, int row, const float* of_row, uint16_t* to, Range range, float factor) {
        __m512 largest = _mm512_loadu_ps(of_row + range.begin);
        for (int at = range.begin + kLanes; at < range.end; at += kLanes) {
            largest = _mm512_max_ps(largest, _mm512_loadu_ps(of_row + at));
        }
        const float before = rows.most[row];
        const float now = std::max(before, _mm512_reduce_max_ps(largest) * factor);
        // Nothing of this block is visible to the row, nor was anything before.
        const float base = now == kMinusInfinity ? 0.0f : now;
        if (now != before) rescale(rows, row, before - base);
        rows.most[row] = now;
        const __m512 factors = _mm512_set1_ps(factor), bases = _mm512_set1_ps(base);
        __m512 total = _mm512_load_ps(rows.totals + row * kLanes);
        for (int at = range.begin; at < range.end; at += kPair) {
            const __m512 low = power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(of_row + at), factors, bases));
            const __m512 high = power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(of_row + at + kLanes), factors, bases));
            total = _mm512_add_ps(total, _mm512_add_ps(low, high));
            _mm512_storeu_si512(to + at, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        }
        _mm512_store_ps(rows.totals + row * kLanes, total);
    }

    void rescale(const Rows& rows, int row, float exponent) {
        const __m512 shrink = power_of_two(_mm512_set1_ps(exponent));
        float* of_row = rows.sums + row * a.value_width;
        for (int64_t d = 0; d < a.value_width; d += kLanes) {
            _mm512_storeu_ps(of_row + d, _mm512_mul_ps(_mm512_loadu_ps(of_row + d), shrink));
        }
        _mm512_store_ps(rows.totals + row * kLanes, _mm512_mul_ps(_mm512_load_ps(rows.totals + row * kLanes), shrink));
    }

    // 0 x NaN is NaN: where a value is no number, a row must not meet slots that it doesn't see.
    bool are_finite(Range range) const {
        const __m512i exponent = _mm512_set1_epi16(0x7f80);
        __mmask32 found = 0;
        for (int panel = 0; panel < panels; ++panel) {
            for (int at = range.begin; at < range.end; at += 2) {
                const __m512i pairs = _mm512_load_si512(values + (panel * kBlock + at) * kLanes);
                found |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(pairs, exponent), exponent);
            }
        }
        return found == 0;
    }

    void add_what_is_seen(float* sums, int of_step, Range own) {
        for (int at = own.begin; at < own.end; ++at) {
            const float weight = to_float(weights[of_step * kBlock + at]);
            for (int64_t d = 0; d < a.value_width; ++d) {
                const int64_t pair = (d / kLanes * kBlock + at / 2 * 2) * kLanes;
                sums[d] += weight * to_float(values[pair + d % kLanes * 2 + at % 2]);
            }
        }
    }

    void write(const Task& task, const Rows& rows) const {
        for (int row = 0; row < rows.count; ++row) {
            const float total = _mm512_reduce_add_ps(_mm512_load_ps(rows.totals + row * kLanes));
            const float* from = rows.sums + row * a.value_width;
            uint16_t* to = a.out_of(task, row);
            for (int64_t d = 0; d < a.value_width; d += kLanes) store_halves(to + d, load(from + d) / total);
        }
    }
};

}  // namespace

#endif  // PROMPTPLEX_BF16_ATTENTION
