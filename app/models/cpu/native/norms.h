// Root mean square normalisation of a row, as transformers rounds it: to bf16 before the weight, and after.

#pragma once

#include <cmath>
#include <cstdint>

#include "vectors.h"

namespace {

// `width` is a multiple of 16; `out` may be `in`.
inline void rms_norm_row(const uint16_t* in, const uint16_t* weight, uint16_t* out, int64_t width, float epsilon) {
    Vector squares{};
    for (int64_t d = 0; d < width; d += kLanes) {
        const Vector x = load_halves(in + d);
        squares += x * x;
    }
    const float scale = 1.0f / std::sqrt(total(squares) / static_cast<float>(width) + epsilon);
    for (int64_t d = 0; d < width; d += kLanes) {
        uint16_t rounded[kLanes];
        store_halves(rounded, load_halves(in + d) * scale);
        store_halves(out + d, load_halves(weight + d) * load_halves(rounded));
    }
}

}  // namespace
