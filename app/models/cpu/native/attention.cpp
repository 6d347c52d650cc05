// Attention of packed tokens: the entry point, called through ctypes (library.py).
//
// Shapes: T packed tokens, H query heads, Hk kv heads, G = H / Hk, D key width, Dv value width, S slots.
// bf16 numbers travel as uint16_t; sums are in float.

#include "attention.h"

#include <cstdint>
#include <vector>

extern "C" {

// Attention of packed tokens over resident keys and values. Widths are multiples of 16; H / Hk <= 56; the scale is positive.
// An item's last slots are its tokens' own where it is causal or has a bias; no item is without slots.
void promptplex_attention(
    const uint16_t* query, int64_t token_stride, int64_t head_stride, const uint16_t* keys, const uint16_t* values,
    uint16_t* out, const int64_t* slots, const int64_t* slot_begin, const int64_t* token_begin, int64_t items,
    int64_t heads, int64_t kv_heads, int64_t width, int64_t value_width, int64_t window, int is_causal,
    const float* bias, int64_t reach, float scale, int threads) {
    const Attention attention{query, token_stride, head_stride, keys, values, out, slots, slot_begin, token_begin,
                              heads, kv_heads, width, value_width, window, is_causal != 0, bias, reach, scale};
    const std::vector<Task> tasks = tasks_of(attention, items, threads);
#pragma omp parallel num_threads(threads)
    {
        Worker worker(attention);
#pragma omp for schedule(dynamic, 1)
        for (size_t task = 0; task < tasks.size(); ++task) worker.run(tasks[task]);
    }
}

}  // extern "C"
