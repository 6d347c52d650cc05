// The two products of attention on bf16 multipliers: queries times keys, weights times values.
//
// Both are A [rows, K] times B [K, columns], A row by row, B in panels of 16 columns: [columns / 16][K / 2][16][2].
// Rows come in steps; K and the columns of a pair of panels are padded to multiples of 32.

#pragma once

#include <cstdint>

#include "tiles.h"
#include "vectors.h"

#if defined(__AVX512BF16__) && defined(__AVX512DQ__) && defined(__AVX512BW__)
#define PROMPTPLEX_BF16_ATTENTION 1
#include <immintrin.h>
#else
#define PROMPTPLEX_BF16_ATTENTION 0
#endif

#if PROMPTPLEX_BF16_ATTENTION

namespace {

constexpr int kDepth = 32;  // numbers of K that a tile multiplies at once

struct Product {
    const uint16_t* a;
    int64_t a_pitch;  // of rows
    const uint16_t* b;
    int64_t panel;  // from one panel of B to the next
    int64_t depth;  // K, a multiple of 32
    float* sums;
    int64_t sums_pitch;
    bool adds;  // to the sums that are there
};

// `vdpbf16ps`: a pair of A times the pairs of 16 columns.
struct VectorProducts {
    static constexpr int kStep = 8;

    static void begin() {}
    static void end() {}

    template <int kPanels>
    static void multiply(const Product& p) {
        __m512 sums[kStep][kPanels];
        for (int row = 0; row < kStep; ++row) {
            for (int panel = 0; panel < kPanels; ++panel) {
                const float* from = p.sums + row * p.sums_pitch + panel * kLanes;
                sums[row][panel] = p.adds ? _mm512_loadu_ps(from) : _mm512_setzero_ps();
            }
        }
        const uint16_t* b = p.b;
        for (int64_t k = 0; k < p.depth; k += 2, b += 2 * kLanes) {
            __m512i columns[kPanels];
            for (int panel = 0; panel < kPanels; ++panel) columns[panel] = _mm512_loadu_si512(b + panel * p.panel);
            for (int row = 0; row < kStep; ++row) {
                int32_t pair;
                std::memcpy(&pair, p.a + row * p.a_pitch + k, sizeof pair);
                const __m512bh pairs = (__m512bh)_mm512_set1_epi32(pair);
                for (int panel = 0; panel < kPanels; ++panel) {
                    sums[row][panel] = _mm512_dpbf16_ps(sums[row][panel], pairs, (__m512bh)columns[panel]);
                }
            }
        }
        for (int row = 0; row < kStep; ++row) {
            for (int panel = 0; panel < kPanels; ++panel) {
                _mm512_storeu_ps(p.sums + row * p.sums_pitch + panel * kLanes, sums[row][panel]);
            }
        }
    }
};

#if PROMPTPLEX_TILES

// Tiles: one of 8 rows for few rows, else two of 16.
template <int kTilesOfRows>
struct TileProducts {
    static constexpr int kRowsOfTile = kTilesOfRows == 1 ? 8 : kTileRows;
    static constexpr int kStep = kTilesOfRows * kRowsOfTile;

    static void begin() { configure_tiles(kRowsOfTile); }
    static void end() { release_tiles(); }

    template <int kPanels>
    static void multiply(const Product& p) {
        const int64_t pitch = p.a_pitch * sizeof(uint16_t);
        each_sum<kPanels>(p, p.adds ? Sums::kLoad : Sums::kZero);
        for (int64_t k = 0; k < p.depth; k += kDepth) {
            load_tile<6>(p.b + k * kLanes, kTileBytes);
            if constexpr (kPanels == 2) load_tile<7>(p.b + p.panel + k * kLanes, kTileBytes);
            load_tile<4>(p.a + k, pitch);
            multiply_tiles<0, 4, 6>();
            if constexpr (kPanels == 2) multiply_tiles<1, 4, 7>();
            if constexpr (kTilesOfRows == 2) {
                load_tile<5>(p.a + kTileRows * p.a_pitch + k, pitch);
                multiply_tiles<2, 5, 6>();
                if constexpr (kPanels == 2) multiply_tiles<3, 5, 7>();
            }
        }
        each_sum<kPanels>(p, Sums::kStore);
    }

  private:
    enum class Sums { kZero, kLoad, kStore };

    template <int kPanels>
    static void each_sum(const Product& p, Sums what) {
        float* lower = p.sums + kTileRows * p.sums_pitch;
        one_sum<0>(p.sums, p.sums_pitch, what);
        if constexpr (kPanels == 2) one_sum<1>(p.sums + kLanes, p.sums_pitch, what);
        if constexpr (kTilesOfRows == 2) one_sum<2>(lower, p.sums_pitch, what);
        if constexpr (kTilesOfRows == 2 && kPanels == 2) one_sum<3>(lower + kLanes, p.sums_pitch, what);
    }

    template <int kTile>
    static void one_sum(float* sums, int64_t pitch, Sums what) {
        if (what == Sums::kZero) return zero_tile<kTile>();
        if (what == Sums::kLoad) return load_tile<kTile>(sums, pitch * sizeof(float));
        store_tile<kTile>(sums, pitch * sizeof(float));
    }
};

#endif  // PROMPTPLEX_TILES

// All columns, two panels at a time.
template <class Products>
inline void multiply_panels(Product p, int panels) {
    for (; panels >= 2; panels -= 2, p.b += 2 * p.panel, p.sums += 2 * kLanes) Products::template multiply<2>(p);
    if (panels == 1) Products::template multiply<1>(p);
}

}  // namespace

#endif  // PROMPTPLEX_BF16_ATTENTION
