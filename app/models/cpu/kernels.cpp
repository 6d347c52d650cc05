// Kernels for bf16 models on CPUs. Plain C symbols, called through ctypes (library.py).
//
// Shapes: T packed tokens, H query heads, Hk kv heads, G = H / Hk, D key width, Dv value width,
// S slots, N rows. bf16 numbers travel as uint16_t; all arithmetic is in float.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "attention.h"
#include "vectors.h"

extern "C" {

// Attention of packed tokens over resident keys and values. Widths are multiples of 16; H / Hk <= 56.
// An item's last slots are its tokens' own where it is causal or has a bias; no item is without slots.
void promptplex_attention(
    const uint16_t* query, int64_t token_stride, int64_t head_stride, const uint16_t* keys, const uint16_t* values,
    uint16_t* out, const int64_t* slots, const int64_t* slot_begin, const int64_t* token_begin, int64_t items,
    int64_t heads, int64_t kv_heads, int64_t width, int64_t value_width, int64_t window, int is_causal,
    const float* bias, int64_t reach, float scale, int threads) {
    const Attention attention{query, token_stride, head_stride, keys, values, out, slots, slot_begin, token_begin,
                              heads, kv_heads, width, value_width, window, is_causal != 0, bias, reach, scale};
    const int64_t tokens_at_once = std::max<int64_t>(1, kRows / (heads / kv_heads));
    std::vector<Task> tasks;
    for (int64_t item = 0; item < items; ++item) {
        const int64_t tokens = token_begin[item + 1] - token_begin[item];
        for (int64_t first = 0; first < tokens; first += tokens_at_once) {
            for (int64_t kv_head = 0; kv_head < kv_heads; ++kv_head) {
                tasks.push_back({item, kv_head, first, std::min(tokens_at_once, tokens - first)});
            }
        }
    }
#pragma omp parallel num_threads(threads)
    {
        Worker worker(attention);
#pragma omp for schedule(dynamic, 1)
        for (size_t task = 0; task < tasks.size(); ++task) worker.run(tasks[task]);
    }
}

// out = silu(gate) * up, element by element. `out` may be `gate`.
void promptplex_silu_times(const uint16_t* gate, const uint16_t* up, uint16_t* out, int64_t count, int threads) {
    const int64_t whole = count / kLanes * kLanes;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t at = 0; at < whole; at += kLanes) {
        const Vector x = load_halves(gate + at);
        const Vector size = x < 0.0f ? x : -x;  // -|x|, and NaN for NaN
        const Vector small = exponential(size);
        const Vector sigmoid = (x < 0.0f ? small : splat(1.0f)) / (small + 1.0f);
        store_halves(out + at, x * sigmoid * load_halves(up + at));
    }
    for (int64_t at = whole; at < count; ++at) {
        const float x = to_float(gate[at]);
        out[at] = to_half(x / (1.0f + std::exp(-x)) * to_float(up[at]));
    }
}

// Root mean square normalisation of rows [N, d], as transformers rounds it: to bf16 before the weight, and after.
void promptplex_rms_norm(
    const uint16_t* in, const uint16_t* weight, uint16_t* out, int64_t rows, int64_t width, float epsilon,
    int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; ++row) {
        const uint16_t* from = in + row * width;
        uint16_t* to = out + row * width;
        Vector squares{};
        for (int64_t d = 0; d < width; d += kLanes) {
            const Vector x = load_halves(from + d);
            squares += x * x;
        }
        const float scale = 1.0f / std::sqrt(total(squares) / static_cast<float>(width) + epsilon);
        for (int64_t d = 0; d < width; d += kLanes) {
            uint16_t rounded[kLanes];
            store_halves(rounded, load_halves(from + d) * scale);
            store_halves(to + d, load_halves(weight + d) * load_halves(rounded));
        }
    }
}

}  // extern "C"
