// Attention of packed tokens over keys and values that lie in slots of a pool: the tasks, and what runs one.

#pragma once

#include <algorithm>
#include <cstdint>
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
constexpr int kTasksOfThread = 4;  // at least, so that threads end together; where tokens allow it

// Runs tasks of one attention on the thread that made it.
class Worker {
  public:
    explicit Worker(const Attention& given) : a(given) {}

    void run(const Task& task) {
#if PROMPTPLEX_BF16_ATTENTION
        const int64_t rows = task.count * a.group();
        if (rows > kFewRows) {
#if PROMPTPLEX_TILES
            if (are_tiles_permitted()) {
                if (rows > TileProducts<1>::kStep) return Bf16Worker<TileProducts<2>>(a).run(task);
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

// Split items into tasks for so many threads, the longest ones first.
inline std::vector<Task> tasks_of(const Attention& a, int64_t items, int threads) {
    const int64_t wanted = a.token_begin[items] * a.heads / (kTasksOfThread * threads);
    const int64_t tokens_at_once = std::max<int64_t>(1, std::clamp<int64_t>(wanted, kRows, kTaskRows) / a.group());
    std::vector<Task> tasks;
    for (int64_t item = 0; item < items; ++item) {
        const int64_t tokens = a.token_begin[item + 1] - a.token_begin[item];
        for (int64_t first = 0; first < tokens; first += tokens_at_once) {
            for (int64_t kv_head = 0; kv_head < a.kv_heads; ++kv_head) {
                tasks.push_back({item, kv_head, first, std::min(tokens_at_once, tokens - first)});
            }
        }
    }
    const auto cost = [&a](const Task& task) {
        const Sight sight = a.sight(task);
        return (sight.end - sight.begin) * task.count;
    };
    std::stable_sort(tasks.begin(), tasks.end(),
                     [&cost](const Task& one, const Task& other) { return cost(one) > cost(other); });
    return tasks;
}

}  // namespace
