// Products of rows with frozen weights: rows [M, K] times weights [N, K], for one row as for thousands.
//
// Weights are packed once, into panels of 16 outputs: [N / 16][K / 2][16][2], so that a vector (AVX-512 bf16) or a row
// of a tile (AMX) holds two inputs of 16 outputs, and a thread reads its share of the weights from begin to end.
// Two panels at a time meet the rows, some at a time: their sums stay in registers. With few rows the weights'
// way from memory is the limit, so lines are asked for early: of the same panels, or, where more rows than
// one tile's have to pass first, of the next ones.
//
// A sum's order of additions doesn't depend on how many rows there are.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "activations.h"
#include "tiles.h"
#include "vectors.h"

#if PROMPTPLEX_TILES
#define PROMPTPLEX_PRODUCTS 2
#elif defined(__AVX512BF16__)
#define PROMPTPLEX_PRODUCTS 1
#include <immintrin.h>
#else
#define PROMPTPLEX_PRODUCTS 0
#endif

namespace {

constexpr int64_t kInputsAtOnce = 32;  // of a tile; K is filled up with zeros to a multiple
constexpr int kPanels = 2;             // that meet the rows at once
constexpr int kOutputsAtOnce = kPanels * kLanes;

inline int64_t padded_inputs(int64_t inputs) { return (inputs + kInputsAtOnce - 1) / kInputsAtOnce * kInputsAtOnce; }
inline int64_t panel_size(int64_t inputs) { return padded_inputs(inputs) * kLanes; }

// Weights [N, K] in panels. N is filled up to whole panels.
struct Weights {
    const uint16_t* panels;
    const uint16_t* bias;  // [N]; null: none
    int64_t outputs, inputs;

    int64_t groups() const { return (outputs + kOutputsAtOnce - 1) / kOutputsAtOnce; }
};

// Write one panel of `weights [N, K]`: outputs from `first` on, as many as there are.
inline void pack_panel(const uint16_t* weights, int64_t outputs, int64_t inputs, int64_t first, uint16_t* panel) {
    const int64_t count = std::min<int64_t>(kLanes, outputs - first);
    for (int64_t k = 0; k < padded_inputs(inputs); k += 2 * kLanes) {
        Vector block[kLanes] = {};  // pairs of inputs as numbers of 32 bits
        const int64_t present = std::clamp<int64_t>(inputs - k, 0, 2 * kLanes) * sizeof *weights;
        for (int64_t lane = 0; lane < count; ++lane) {
            std::memcpy(&block[lane], weights + (first + lane) * inputs + k, present);
        }
        transpose(block);
        std::memcpy(panel + k * kLanes, block, sizeof block);
    }
}

#if PROMPTPLEX_PRODUCTS == 2
constexpr int kRowsOfTile = 2 * kTileRows;
#else
constexpr int kRowsOfTile = 14;  // times two panels: 28 registers of sums, of 32
#endif
constexpr int64_t kTilesAtOnce = 32;  // so many rows stay in the cache while panels pass

// How rows are divided: into tiles of nearly equal size.
struct RowTiles {
    int64_t rows, count;

    explicit RowTiles(int64_t given) : rows(given), count((given + kRowsOfTile - 1) / kRowsOfTile) {}

    int64_t begin(int64_t tile) const {
#if PROMPTPLEX_PRODUCTS == 2
        return std::min(tile * kRowsOfTile, rows);
#else
        return tile * (rows / count) + std::min(tile, rows % count);
#endif
    }
    int size(int64_t tile) const { return static_cast<int>(begin(tile + 1) - begin(tile)); }
};

// Rows [M, K] in the order in which a product reads them.
class PackedRows {
  public:
    PackedRows(int64_t rows, int64_t inputs, uint32_t* memory) : tiles(rows), pairs(padded_inputs(inputs) / 2), memory(memory) {}

    // In 32-bit words.
    static int64_t size(int64_t rows, int64_t inputs) {
        const RowTiles tiles(rows);
#if PROMPTPLEX_PRODUCTS == 2
        return tiles.count * kRowsOfTile * padded_inputs(inputs) / 2;
#else
        return rows * padded_inputs(inputs) / 2 + (tiles.count + 1) * kLanes;
#endif
    }

    uint32_t* tile(int64_t number) const {
#if PROMPTPLEX_PRODUCTS == 2
        return memory + number * kRowsOfTile * pairs;
#else
        return memory + tiles.begin(number) * pairs + number * kLanes;  // packing writes whole vectors
#endif
    }

    // Pack a tile of `rows`, `pitch` numbers apart.
    void pack(int64_t number, const uint16_t* rows, int64_t pitch, int64_t inputs) const;

    const RowTiles tiles;
    const int64_t pairs;

  private:
    uint32_t* memory;
};

#if PROMPTPLEX_PRODUCTS == 2

// Row by row, filled up with zeros.
inline void PackedRows::pack(int64_t number, const uint16_t* rows, int64_t pitch, int64_t inputs) const {
    uint16_t* to = reinterpret_cast<uint16_t*>(tile(number));
    std::memset(to, 0, kRowsOfTile * pairs * sizeof(uint32_t));
    for (int row = 0; row < tiles.size(number); ++row) {
        std::memcpy(to + row * 2 * pairs, rows + row * pitch, inputs * sizeof *rows);
    }
}

#else

// Turned: [K / 2][rows of the tile][2].
inline void PackedRows::pack(int64_t number, const uint16_t* rows, int64_t pitch, int64_t inputs) const {
    const int count = tiles.size(number);
    uint32_t* to = tile(number);
    for (int64_t pair = 0; pair < pairs; pair += kLanes) {
        Vector block[kLanes] = {};
        const int64_t present = std::clamp<int64_t>(inputs - 2 * pair, 0, 2 * kLanes) * sizeof *rows;
        for (int row = 0; row < count; ++row) std::memcpy(&block[row], rows + row * pitch + 2 * pair, present);
        transpose(block);
        for (int64_t lane = 0; lane < kLanes; ++lane) std::memcpy(to + (pair + lane) * count, &block[lane], sizeof(Vector));
    }
}

#endif

// What becomes of sums, and where they go.
struct Finish {
    uint16_t* out;  // [M, N], or [M, N / 2] where gated
    int64_t pitch;
    Activation activation = Activation::kNone;
    bool is_gated = false;               // panels are gate and up in turns: out = activation(gate) * up
    const uint16_t* residual = nullptr;  // added after rounding, as a layer of its own would; pitch as of `out`

    void write(const Weights& w, const float* sums, int64_t first_row, int rows, int64_t group) const {
        const int64_t output = group * kOutputsAtOnce;
        for (int row = 0; row < rows; ++row, sums += kOutputsAtOnce) {
            if (is_gated) {
                const Vector gate = activated(biased(w, sums, output), activation);
                put(row + first_row, output / 2, kLanes, gate * biased(w, sums + kLanes, output + kLanes));
                continue;
            }
            for (int panel = 0; panel < kPanels && output + panel * kLanes < w.outputs; ++panel) {
                const int64_t at = output + panel * kLanes;
                const int count = static_cast<int>(std::min<int64_t>(kLanes, w.outputs - at));
                put(row + first_row, at, count, activated(biased(w, sums + panel * kLanes, at), activation));
            }
        }
    }

  private:
    static Vector biased(const Weights& w, const float* sums, int64_t output) {
        return w.bias == nullptr ? load(sums) : load(sums) + load_some(w.bias + output, w.outputs - output);
    }

    static Vector load_some(const uint16_t* from, int64_t count) {
        if (count >= kLanes) return load_halves(from);
        uint16_t halves[kLanes] = {};
        std::memcpy(halves, from, count * sizeof *from);
        return load_halves(halves);
    }

    void put(int64_t row, int64_t output, int count, Vector value) const {
        uint16_t* to = out + row * pitch + output;
        if (residual != nullptr) {
            uint16_t rounded[kLanes];
            store_halves(rounded, value);
            value = load_halves(rounded) + load_some(residual + row * pitch + output, count);
        }
        if (count == kLanes) return store_halves(to, value);
        uint16_t halves[kLanes];
        store_halves(halves, value);
        std::memcpy(to, halves, count * sizeof *to);
    }
};

#if PROMPTPLEX_PRODUCTS == 1

constexpr int kAheadBytes = 4096;  // of their use, where the same panels are asked for

// Sums of kRows rows with kCount panels. `ahead` is asked for line by line: kIsFew as many panels, else one.
template <int kRows, int kCount, bool kIsFew>
void multiply_tile(const uint32_t* rows, const uint16_t* panels, int64_t panel, int64_t pairs, const char* ahead,
                   float* sums) {
    __m512 sum[kRows][kCount];
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
        for (int each = 0; each < kCount; ++each) sum[row][each] = _mm512_setzero_ps();
    }
    for (int64_t pair = 0; pair < pairs; ++pair) {
        __m512bh weights[kCount];
#pragma GCC unroll 2
        for (int each = 0; each < kCount; ++each) {
            const uint16_t* from = panels + each * panel + pair * 2 * kLanes;
            weights[each] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(from));
            if (kIsFew) __builtin_prefetch(reinterpret_cast<const char*>(from) + kAheadBytes);
        }
        if (!kIsFew) __builtin_prefetch(ahead + pair * 64, 0, 2);
#pragma GCC unroll 16
        for (int row = 0; row < kRows; ++row) {
            const auto both = _mm512_set1_epi32(static_cast<int>(rows[pair * kRows + row]));
#pragma GCC unroll 2
            for (int each = 0; each < kCount; ++each) {
                sum[row][each] = _mm512_dpbf16_ps(sum[row][each], weights[each], reinterpret_cast<__m512bh>(both));
            }
        }
    }
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
        for (int each = 0; each < kCount; ++each) {
            _mm512_storeu_ps(sums + row * kOutputsAtOnce + each * kLanes, sum[row][each]);
        }
    }
}

template <int kCount, bool kIsFew>
void multiply_rows(int rows, const uint32_t* packed, const uint16_t* panels, int64_t panel, int64_t pairs,
                   const char* ahead, float* sums) {
    using Tile = void (*)(const uint32_t*, const uint16_t*, int64_t, int64_t, const char*, float*);
    static constexpr Tile kTileOf[] = {
        multiply_tile<1, kCount, kIsFew>,  multiply_tile<2, kCount, kIsFew>,  multiply_tile<3, kCount, kIsFew>,
        multiply_tile<4, kCount, kIsFew>,  multiply_tile<5, kCount, kIsFew>,  multiply_tile<6, kCount, kIsFew>,
        multiply_tile<7, kCount, kIsFew>,  multiply_tile<8, kCount, kIsFew>,  multiply_tile<9, kCount, kIsFew>,
        multiply_tile<10, kCount, kIsFew>, multiply_tile<11, kCount, kIsFew>, multiply_tile<12, kCount, kIsFew>,
        multiply_tile<13, kCount, kIsFew>, multiply_tile<14, kCount, kIsFew>,
    };
    kTileOf[rows - 1](packed, panels, panel, pairs, ahead, sums);
}

struct Multiplier {
    explicit Multiplier(const PackedRows&) {}

    // Sums [rows of the tile][32] of two panels, or of the one that is left.
    void multiply(const Weights& w, const PackedRows& rows, int64_t tile, int64_t group, float* sums) const {
        const int64_t panel = panel_size(w.inputs);
        const uint16_t* panels = w.panels + group * kPanels * panel;
        // Each of the first tiles asks for one of the next two panels.
        const bool asks = tile < kPanels && group + 1 < w.groups();
        const char* ahead = reinterpret_cast<const char*>(asks ? panels + (kPanels + tile) * panel : panels);
        const bool is_whole = group * kOutputsAtOnce + kLanes < w.outputs;
        const auto function = rows.tiles.count == 1 ? (is_whole ? multiply_rows<2, true> : multiply_rows<1, true>)
                                                    : (is_whole ? multiply_rows<2, false> : multiply_rows<1, false>);
        function(rows.tiles.size(tile), rows.tile(tile), panels, panel, rows.pairs, ahead, sums);
    }
};

#elif PROMPTPLEX_PRODUCTS == 2

constexpr int kAheadBytes = 4096;

// Up to 32 rows and two panels: four tiles of sums. A thread's tiles are its own.
class Multiplier {
  public:
    explicit Multiplier(const PackedRows& rows) { configure_tiles(static_cast<int>(std::min<int64_t>(rows.tiles.rows, kTileRows))); }
    ~Multiplier() { release_tiles(); }
    Multiplier(const Multiplier&) = delete;

    void multiply(const Weights& w, const PackedRows& rows, int64_t tile, int64_t group, float* sums) const {
        const int64_t panel = panel_size(w.inputs);
        const uint16_t* panels = w.panels + group * kPanels * panel;
        const bool is_whole = group * kOutputsAtOnce + kLanes < w.outputs;
        const auto* packed = reinterpret_cast<const uint16_t*>(rows.tile(tile));
        if (rows.tiles.size(tile) > kTileRows) {
            is_whole ? run<2, 2>(packed, panels, panel, rows.pairs, sums) : run<2, 1>(packed, panels, panel, rows.pairs, sums);
        } else {
            is_whole ? run<1, 2>(packed, panels, panel, rows.pairs, sums) : run<1, 1>(packed, panels, panel, rows.pairs, sums);
        }
    }

  private:
    // Tiles: sums 0 to 3 (row half, panel), rows 4 and 5, panels 6 and 7.
    template <int kHalves, int kCount>
    static void run(const uint16_t* rows, const uint16_t* panels, int64_t panel, int64_t pairs, float* sums) {
        zero_tile<0>();
        if (kCount == 2) zero_tile<1>();
        if (kHalves == 2) zero_tile<2>();
        if (kHalves == 2 && kCount == 2) zero_tile<3>();
        const int64_t pitch = 2 * pairs * sizeof *rows;
        for (int64_t pair = 0; pair < pairs; pair += kTileRows) {
            ask(panels + pair * 2 * kLanes);
            load_tile<6>(panels + pair * 2 * kLanes, kTileBytes);
            load_tile<4>(rows + 2 * pair, pitch);
            multiply_tiles<0, 4, 6>();
            if (kCount == 2) {
                ask(panels + panel + pair * 2 * kLanes);
                load_tile<7>(panels + panel + pair * 2 * kLanes, kTileBytes);
                multiply_tiles<1, 4, 7>();
            }
            if (kHalves == 2) {
                load_tile<5>(rows + kTileRows * 2 * pairs + 2 * pair, pitch);
                multiply_tiles<2, 5, 6>();
                if (kCount == 2) multiply_tiles<3, 5, 7>();
            }
        }
        constexpr int64_t kPitch = kOutputsAtOnce * sizeof *sums;
        store_tile<0>(sums, kPitch);
        if (kCount == 2) store_tile<1>(sums + kLanes, kPitch);
        if (kHalves == 2) store_tile<2>(sums + kTileRows * kOutputsAtOnce, kPitch);
        if (kHalves == 2 && kCount == 2) store_tile<3>(sums + kTileRows * kOutputsAtOnce + kLanes, kPitch);
    }

    // The lines of a panel's next tiles but some.
    static void ask(const uint16_t* from) {
        const char* line = reinterpret_cast<const char*>(from) + kAheadBytes;
        for (int each = 0; each < kTileRows; ++each) __builtin_prefetch(line + each * kTileBytes);
    }
};

#endif

#if PROMPTPLEX_PRODUCTS

// One thread's share of a product: groups [begin, end) of two panels, with all rows.
inline void multiply(const Weights& w, const PackedRows& rows, int64_t begin, int64_t end, const Finish& finish) {
    const Multiplier multiplier(rows);
    alignas(64) float sums[kRowsOfTile * kOutputsAtOnce];
    for (int64_t block = 0; block < rows.tiles.count; block += kTilesAtOnce) {
        const int64_t last = std::min(rows.tiles.count, block + kTilesAtOnce);
        for (int64_t group = begin; group < end; ++group) {
            for (int64_t tile = block; tile < last; ++tile) {
                multiplier.multiply(w, rows, tile, group, sums);
                finish.write(w, sums, rows.tiles.begin(tile), rows.tiles.size(tile), group);
            }
        }
    }
}

#endif

}  // namespace
