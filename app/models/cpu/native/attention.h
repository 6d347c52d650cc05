// Attention of packed tokens over keys and values that lie in slots of a pool: the tasks, and what runs one.

#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "attention_bf16.h"
#include "attention_float.h"
#include "attention_task.h"

namespace {

#if PROMPTPLEX_BF16_ATTENTION
constexpr int kTaskRows = 256;  // rows that share the packing of a block
#else
constexpr int kTaskRows = kRows;
#endif
constexpr int64_t kSharedSlots = 128;  // from so many on a pass over shared slots is worth it
constexpr int kTasksOfThread = 4;  // at least, so that threads end together; where tokens allow it

// Runs tasks of one attention on the thread that made it.
class Worker {
  public:
    explicit Worker(const Attention& given) : a(given) {}

    void run(const Task& task) {
#if PROMPTPLEX_BF16_ATTENTION
        const int64_t rows = task.count * a.group();
        if (rows > kFewRows || !task.members.empty()) {
#if PROMPTPLEX_TILES
            if (are_tiles_permitted()) {
                const bool are_many = rows > TileProducts<1>::kStep && task.members.empty();
                if (are_many) return Bf16Worker<TileProducts<2>>(a).run(task);
                return Bf16Worker<TileProducts<1>>(a).run(task);
            }
#endif
            return Bf16Worker<VectorProducts>(a).run(task);
        }
#endif
        if (!few) few.emplace(a);
        few->run(task);
    }

  private:
    const Attention& a;
    std::optional<FloatWorker> few;
};

#if PROMPTPLEX_BF16_ATTENTION

// Items of one token whose contexts may be shared, in the order of their first slots.
inline std::vector<int64_t> rows_by_first_slot(const Attention& a, int64_t items) {
    std::vector<int64_t> rows;
    for (int64_t item = 0; item < items; ++item) {
        const bool is_row = a.token_begin[item + 1] - a.token_begin[item] == 1;
        if (is_row && a.slot_begin[item + 1] - a.slot_begin[item] > kSharedSlots) rows.push_back(item);
    }
    const auto slot = [&a](int64_t item) { return a.slots[a.slot_begin[item]]; };
    std::stable_sort(rows.begin(), rows.end(), [&slot](int64_t one, int64_t other) { return slot(one) < slot(other); });
    return rows;
}

// How many slots two items have in common from their first on; not their last ones, which are their tokens' own.
inline int64_t shared_slots(const Attention& a, int64_t one, int64_t other) {
    const int64_t* slots = a.slots + a.slot_begin[one];
    const int64_t length = std::min(a.slot_begin[one + 1] - a.slot_begin[one],
                                    a.slot_begin[other + 1] - a.slot_begin[other]);
    return std::mismatch(slots, slots + length - 1, a.slots + a.slot_begin[other]).first - slots;
}

// Rows of sequences that begin with the same slots, as those of one prompt do, share a pass over these slots; so
// many at once that all threads have enough to do. Measured with G = 7, D = 64, 32 rows of 8 prompts, own contexts
// of 100: 1.04 times as fast with prompts of 150 slots, 1.2 with 500, 1.5 with 2,000.
inline std::vector<Task> shared_tasks(const Attention& a, int64_t items, int threads) {
    std::vector<Task> tasks;
    const size_t at_once = items * a.kv_heads / (kTasksOfThread * threads);
    if (at_once < 2 || !a.is_causal || a.window != 0 || a.bias != nullptr) return tasks;
    const std::vector<int64_t> rows = rows_by_first_slot(a, items);
    for (size_t begin = 0, end; begin < rows.size(); begin = end) {
        Task task{rows[begin], 0, 0, 1, {rows[begin]}, std::numeric_limits<int64_t>::max()};
        for (end = begin + 1; end < rows.size() && task.members.size() < at_once; ++end) {
            const int64_t shared = shared_slots(a, task.item, rows[end]);
            if (shared < kSharedSlots) break;
            task.shared = std::min(task.shared, shared);
            task.members.push_back(rows[end]);
        }
        if (task.members.size() == 1) continue;
        for (task.kv_head = 0; task.kv_head < a.kv_heads; ++task.kv_head) tasks.push_back(task);
    }
    return tasks;
}

#else

inline std::vector<Task> shared_tasks(const Attention&, int64_t, int) { return {}; }

#endif

// Split items into tasks for so many threads, the longest ones first.
inline std::vector<Task> tasks_of(const Attention& a, int64_t items, int threads) {
    const int64_t wanted = a.token_begin[items] * a.heads / (kTasksOfThread * threads);
    const int64_t tokens_at_once = std::max<int64_t>(1, std::clamp<int64_t>(wanted, kRows, kTaskRows) / a.group());
    std::vector<Task> tasks = shared_tasks(a, items, threads);
    std::vector<bool> is_taken(items);
    for (const Task& task : tasks) {
        for (const int64_t item : task.members) is_taken[item] = true;
    }
    for (int64_t item = 0; item < items; ++item) {
        if (is_taken[item]) continue;
        const int64_t tokens = a.token_begin[item + 1] - a.token_begin[item];
        for (int64_t first = 0; first < tokens; first += tokens_at_once) {
            for (int64_t kv_head = 0; kv_head < a.kv_heads; ++kv_head) {
                tasks.push_back({item, kv_head, first, std::min(tokens_at_once, tokens - first), {}, 0});
            }
        }
    }
    const auto cost = [&a](const Task& task) {
        const Sight sight = a.sight(task);
        return (sight.end - sight.begin) * std::max<int64_t>(task.count, task.members.size());
    };
    std::stable_sort(tasks.begin(), tasks.end(),
                     [&cost](const Task& one, const Task& other) { return cost(one) > cost(other); });
    return tasks;
}

}  // namespace
