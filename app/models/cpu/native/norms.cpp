// Norms of rows [N, d], called through ctypes (library.py). bf16 numbers travel as uint16_t; arithmetic is in float.

#include <cstdint>

#include "norms.h"

extern "C" {

// Root mean square normalisation of rows [N, d], as transformers rounds it: to bf16 before the weight, and after.
void promptplex_rms_norm(
    const uint16_t* in, const uint16_t* weight, uint16_t* out, int64_t rows, int64_t width, float epsilon,
    int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; ++row) {
        rms_norm_row(in + row * width, weight, out + row * width, width, epsilon);
    }
}

}  // extern "C"
