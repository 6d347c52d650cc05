// From logits to tokens: the entry point, called through ctypes (app/engine/sampling/native_sampler.py).

#include "sampling.h"

#include <cstdint>
#include <memory>

extern "C" {

// Choose the next token of N rows of n logits, in float32 or bf16. `top_ids` and `top_values` are [N, most].
void promptplex_sample(
    const void* logits, int is_bf16, int64_t num_rows, int64_t n, Row* rows, const Edit* edits, int64_t num_edits,
    int64_t* top_ids, float* top_values, int64_t most, void* exponentials, void* logarithms, void* softmax_exp,
    int threads) {
    static thread_local std::unique_ptr<Chooser> kept;
    static thread_local int64_t size = 0;
#pragma omp parallel num_threads(threads)
    {
        if (size != n) {
            kept = std::make_unique<Chooser>(
                reinterpret_cast<VectorMath>(exponentials), reinterpret_cast<VectorMath>(logarithms),
                reinterpret_cast<SoftmaxExp>(softmax_exp), n);
            size = n;
        }
        Chooser& chooser = *kept;
#pragma omp for schedule(dynamic, 1)
        for (int64_t row = 0; row < num_rows; ++row) {
            int64_t* ids = top_ids + row * most;
            float* values = top_values + row * most;
            if (is_bf16) {
                const auto* given = static_cast<const uint16_t*>(logits) + row * n;
                chooser.choose(given, row, rows[row], edits, num_edits, ids, values);
            } else {
                const auto* given = static_cast<const float*>(logits) + row * n;
                chooser.choose(given, row, rows[row], edits, num_edits, ids, values);
            }
        }
    }
}

}  // extern "C"
