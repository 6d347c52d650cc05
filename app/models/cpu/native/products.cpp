// Products with packed weights: the entry points, called through ctypes (products.py). See products.h.

#include "products.h"

#include <omp.h>

#if PROMPTPLEX_PRODUCTS

namespace {

template <class Format>
void multiply_all(const uint16_t* rows, int64_t pitch, int64_t count, const Weights& weights, const Finish& finish,
                  int threads) {
    static thread_local std::vector<uint32_t> memory;
    memory.resize(std::max<size_t>(memory.size(), PackedRows<Format>::size(count, weights.inputs)));
    const PackedRows<Format> packed(count, weights.inputs, memory.data());
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t tile = 0; tile < packed.tiles.count; ++tile) {
            packed.pack(tile, rows + packed.tiles.begin(tile) * pitch, pitch, weights.inputs);
        }
        const int64_t thread = omp_get_thread_num(), all = omp_get_num_threads(), groups = weights.groups();
        multiply(weights, packed, groups * thread / all, groups * (thread + 1) / all, finish);
    }
}

}  // namespace

#endif

extern "C" {

// 0: this processor has no instructions for them; 1: AVX-512 bf16; 2: matrix tiles.
int promptplex_products_kind() {
#if PROMPTPLEX_PRODUCTS == 2
    return are_tiles_permitted() ? 2 : 0;
#else
    return PROMPTPLEX_PRODUCTS;
#endif
}

// Whether there are products of integers too.
int promptplex_has_int8() { return PROMPTPLEX_INT8; }

// Pack `weights [N, K]` in bf16 into `panels`.
void promptplex_pack_weights(const uint16_t* weights, int64_t outputs, int64_t inputs, uint32_t* panels, int threads) {
    const int64_t count = (outputs + kLanes - 1) / kLanes;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t panel = 0; panel < count; ++panel) {
        pack_panel(weights, outputs, inputs, panel * kLanes, panels + panel * padded_words<Bf16>(inputs) * kLanes);
    }
}

#if PROMPTPLEX_PRODUCTS

// out = rows [M, K] times weights [N, K], plus the bias, through the activation. See `Finish` for the rest.
void promptplex_multiply(const uint16_t* rows, int64_t pitch, int64_t count, const uint32_t* panels,
                         const Channels* channels, const uint16_t* bias, int64_t outputs, int64_t inputs,
                         int activation, int is_gated, uint16_t* out, int64_t out_pitch, int threads) {
    const Weights weights({panels, channels, bias}, outputs, inputs);
    const Finish finish{out, out_pitch, static_cast<Activation>(activation), is_gated != 0};
#if PROMPTPLEX_INT8
    if (channels != nullptr) return multiply_all<Int8>(rows, pitch, count, weights, finish, threads);
#endif
    multiply_all<Bf16>(rows, pitch, count, weights, finish, threads);
}

#endif

}  // extern "C"
