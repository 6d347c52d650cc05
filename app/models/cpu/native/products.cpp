// Products with packed weights: the entry points, called through ctypes (products.py). See products.h.

#include "products.h"

#include <omp.h>

extern "C" {

// 0: this processor has no instructions for them; 1: AVX-512 bf16; 2: matrix tiles.
int promptplex_products_kind() {
#if PROMPTPLEX_PRODUCTS == 2
    return are_tiles_permitted() ? 2 : 0;
#else
    return PROMPTPLEX_PRODUCTS;
#endif
}

// How many numbers the panels of weights [N, K] have.
int64_t promptplex_panels_size(int64_t outputs, int64_t inputs) {
    const int64_t panels = (outputs + kLanes - 1) / kLanes;
    return panels * panel_size(inputs);
}

// Pack `weights [N, K]` into `panels`; `step` panels apart, for two weights in turns.
void promptplex_pack_weights(const uint16_t* weights, int64_t outputs, int64_t inputs, int64_t step, uint16_t* panels,
                             int threads) {
    const int64_t count = (outputs + kLanes - 1) / kLanes;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t panel = 0; panel < count; ++panel) {
        pack_panel(weights, outputs, inputs, panel * kLanes, panels + panel * step * panel_size(inputs));
    }
}

#if PROMPTPLEX_PRODUCTS

// out = rows [M, K] times weights [N, K], plus the bias, through the activation. See `Finish` for the rest.
void promptplex_multiply(const uint16_t* rows, int64_t pitch, int64_t count, const uint16_t* panels,
                         const uint16_t* bias, int64_t outputs, int64_t inputs, int activation, int is_gated,
                         uint16_t* out, int64_t out_pitch, int threads) {
    static thread_local std::vector<uint32_t> memory;
    memory.resize(std::max<size_t>(memory.size(), PackedRows::size(count, inputs)));
    const Weights weights{panels, bias, outputs, inputs};
    const PackedRows packed(count, inputs, memory.data());
    const Finish finish{out, out_pitch, static_cast<Activation>(activation), is_gated != 0};
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t tile = 0; tile < packed.tiles.count; ++tile) {
            packed.pack(tile, rows + packed.tiles.begin(tile) * pitch, pitch, inputs);
        }
        const int64_t thread = omp_get_thread_num(), all = omp_get_num_threads(), groups = weights.groups();
        multiply(weights, packed, groups * thread / all, groups * (thread + 1) / all, finish);
    }
}

#endif

}  // extern "C"
