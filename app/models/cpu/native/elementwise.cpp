// Element by element, and row by row. Shapes: N rows. bf16 numbers travel as uint16_t; arithmetic is in float.

#include <cmath>
#include <cstdint>

#include "vectors.h"

extern "C" {

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
