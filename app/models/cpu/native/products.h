// Products of rows with frozen weights: rows [M, K] times weights [N, K], for one row as for thousands.
//
// Weights are packed once, into panels of 16 outputs: [N / 16][K / 2][16][2], so that a vector (AVX-512 bf16) or a row
// of a tile (AMX) holds two inputs of 16 outputs, and a thread reads its share of the weights from begin to end.
// Two panels at a time meet the rows, some at a time: their sums stay in registers. With few rows the weights'
// way from memory is the limit, so lines are asked for early: of the same panels, or, where more rows than
// one tile's have to pass first, of the next ones.
//
// A sum's order of additions doesn't depend on how many rows there are.
//
// Numbers are bf16, or integers of 8 bits (`Format`). Then weights have a scale for each output, and a row gets one
// while it is packed: its largest number becomes 127. Instructions multiply unsigned rows by signed weights, so 128 is
// added to a row's integers, and 128 times an output's sum of weights is taken off its sums, which are exact.
// Layout and loops are the same, in words of 32 bits: two numbers of bf16, or four integers.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
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

#if (PROMPTPLEX_PRODUCTS == 2 && PROMPTPLEX_BYTE_TILES) || (PROMPTPLEX_PRODUCTS == 1 && defined(__AVX512VNNI__))
#define PROMPTPLEX_INT8 1
#else
#define PROMPTPLEX_INT8 0
#endif

namespace {

constexpr int64_t kWordsAtOnce = 16;  // of a tile; K is filled up with zeros to a multiple
constexpr int kPanels = 2;            // that meet the rows at once
constexpr int kOutputsAtOnce = kPanels * kLanes;

// What a panel's integers stand for: sums less `corrections`, times `scales`.
struct Channels {
    Vector scales;
    Integers corrections;
};

// Frozen weights as Python holds them; the order is that of products.py.
struct Packed {
    const uint32_t* panels;
    const Channels* channels;  // of each panel; null: the numbers are bf16
    const uint16_t* bias;      // [N]; null: none
};

// Weights [N, K] in panels. N is filled up to whole panels.
struct Weights : Packed {
    int64_t outputs, inputs;

    Weights(const Packed& packed, int64_t outputs, int64_t inputs) : Packed(packed), outputs(outputs), inputs(inputs) {}
    int64_t groups() const { return (outputs + kOutputsAtOnce - 1) / kOutputsAtOnce; }
};

// Write `count` numbers as integers from 1 to 255 and return the scale of what is above 128. A row with a number
// that isn't finite gets a scale that isn't.
inline float quantise_row(const uint16_t* row, int64_t count, uint8_t* out) {
    uint16_t largest = 0;
    for (int64_t k = 0; k < count; ++k) largest = std::max<uint16_t>(largest, row[k] & 0x7fff);
    const float most = to_float(largest), inverse = most > 0 ? 127.0f / most : 0.0f;
    // Adding it rounds to an integer, which the low bits then hold.
    const Vector magic = splat(12582912.0f + 128.0f);
    for (int64_t k = 0; k < count; k += kLanes) {
        uint16_t halves[kLanes] = {};
        const int64_t present = std::min<int64_t>(kLanes, count - k);
        std::memcpy(halves, row + k, present * sizeof *row);
        const Vector rounded = load_halves(halves) * inverse + magic;
        Words words;
        std::memcpy(&words, &rounded, sizeof words);
        const Octets octets = __builtin_convertvector(words & 0xff, Octets);
        std::memcpy(out + k, &octets, present);
    }
    return most / 127.0f;
}

// How numbers lie in words, what instruction multiplies them, and what their sums are worth.
struct Bf16 {
    static constexpr int kInWord = 2;
    static constexpr bool kIsQuantised = false;

    static Vector value(const Weights&, const uint32_t* sums, int64_t, float) {
        Vector value;
        std::memcpy(&value, sums, sizeof value);
        return value;
    }
#if PROMPTPLEX_PRODUCTS == 1
    static __m512i add(__m512i sum, __m512i rows, __m512i weights) {
        const auto a = reinterpret_cast<__m512bh>(weights), b = reinterpret_cast<__m512bh>(rows);
        return _mm512_castps_si512(_mm512_dpbf16_ps(_mm512_castsi512_ps(sum), a, b));
    }
#elif PROMPTPLEX_PRODUCTS == 2
    template <int kSums, int kA, int kB>
    static void add() {
        multiply_tiles<kSums, kA, kB>();
    }
#endif
};

struct Int8 {
    static constexpr int kInWord = 4;
    static constexpr bool kIsQuantised = true;

    static Vector value(const Weights& w, const uint32_t* sums, int64_t output, float scale) {
        Channels channels;
        std::memcpy(&channels, w.channels + output / kLanes, sizeof channels);
        Integers whole;
        std::memcpy(&whole, sums, sizeof whole);
        return __builtin_convertvector(whole - channels.corrections, Vector) * channels.scales * scale;
    }
#if PROMPTPLEX_INT8 && PROMPTPLEX_PRODUCTS == 1
    static __m512i add(__m512i sum, __m512i rows, __m512i weights) { return _mm512_dpbusd_epi32(sum, rows, weights); }
#elif PROMPTPLEX_INT8 && PROMPTPLEX_PRODUCTS == 2
    template <int kSums, int kA, int kB>
    static void add() {
        multiply_byte_tiles<kSums, kA, kB>();
    }
#endif
};

template <class Format>
constexpr int64_t padded_words(int64_t inputs) {
    return (inputs + kWordsAtOnce * Format::kInWord - 1) / (kWordsAtOnce * Format::kInWord) * kWordsAtOnce;
}

// Write one panel of `weights [N, K]`: outputs from `first` on, as many as there are.
inline void pack_panel(const uint16_t* weights, int64_t outputs, int64_t inputs, int64_t first, uint32_t* panel) {
    const int64_t count = std::min<int64_t>(kLanes, outputs - first);
    for (int64_t k = 0; k < inputs; k += 2 * kLanes) {
        Vector block[kLanes] = {};  // pairs of inputs as numbers of 32 bits
        const int64_t present = std::min<int64_t>(inputs - k, 2 * kLanes) * sizeof *weights;
        for (int64_t lane = 0; lane < count; ++lane) {
            std::memcpy(&block[lane], weights + (first + lane) * inputs + k, present);
        }
        transpose(block);
        std::memcpy(panel + k / 2 * kLanes, block, sizeof block);
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

// Rows [M, K] in the order in which a product reads them, and the scales of quantised ones.
template <class Format>
class PackedRows {
  public:
    PackedRows(int64_t rows, int64_t inputs, uint32_t* memory)
        : tiles(rows), words(padded_words<Format>(inputs)), memory(memory),
          scales(reinterpret_cast<float*>(memory + size_of_tiles(tiles, words))) {}

    // In 32-bit words.
    static int64_t size(int64_t rows, int64_t inputs) {
        return size_of_tiles(RowTiles(rows), padded_words<Format>(inputs)) + (Format::kIsQuantised ? rows : 0);
    }

    uint32_t* tile(int64_t number) const {
#if PROMPTPLEX_PRODUCTS == 2
        return memory + number * kRowsOfTile * words;
#else
        return memory + tiles.begin(number) * words + number * kLanes;  // packing writes whole vectors
#endif
    }

    float scale(int64_t row) const { return Format::kIsQuantised ? scales[row] : 1.0f; }

    // Pack a tile of `rows`, `pitch` numbers apart.
    void pack(int64_t number, const uint16_t* rows, int64_t pitch, int64_t inputs) const {
        if constexpr (Format::kIsQuantised) {
            static thread_local std::vector<uint8_t> quantised;
            if (static_cast<int64_t>(quantised.size()) < kRowsOfTile * inputs) quantised.resize(kRowsOfTile * inputs);
            for (int row = 0; row < tiles.size(number); ++row) {
                uint8_t* to = quantised.data() + row * inputs;
                scales[tiles.begin(number) + row] = quantise_row(rows + row * pitch, inputs, to);
            }
            put(number, quantised.data(), inputs, inputs);
        } else {
            put(number, reinterpret_cast<const uint8_t*>(rows), pitch * sizeof *rows, inputs * sizeof *rows);
        }
    }

    const RowTiles tiles;
    const int64_t words;  // of a row

  private:
    static int64_t size_of_tiles(const RowTiles& tiles, int64_t words) {
#if PROMPTPLEX_PRODUCTS == 2
        return tiles.count * kRowsOfTile * words;
#else
        return tiles.rows * words + (tiles.count + 1) * kLanes;
#endif
    }

    // Put rows of `width` bytes into a tile.
    void put(int64_t number, const uint8_t* rows, int64_t pitch, int64_t width) const {
        const int count = tiles.size(number);
#if PROMPTPLEX_PRODUCTS == 2
        // Row by row, filled up with zeros.
        uint32_t* to = tile(number);
        std::memset(to, 0, kRowsOfTile * words * sizeof *to);
        for (int row = 0; row < count; ++row) std::memcpy(to + row * words, rows + row * pitch, width);
#else
        // Turned: [words][rows of the tile].
        uint32_t* to = tile(number);
        for (int64_t word = 0; word < words; word += kLanes) {
            Vector block[kLanes] = {};
            const int64_t begin = word * sizeof *to;
            const int64_t present = std::clamp<int64_t>(width - begin, 0, sizeof(Vector));
            for (int row = 0; row < count; ++row) std::memcpy(&block[row], rows + row * pitch + begin, present);
            transpose(block);
            for (int64_t lane = 0; lane < kLanes; ++lane) {
                std::memcpy(to + (word + lane) * count, &block[lane], sizeof(Vector));
            }
        }
#endif
    }

    uint32_t* memory;
    float* scales;  // [M]
};

// What becomes of sums, and where they go.
struct Finish {
    uint16_t* out;  // [M, N], or [M, N / 2] where gated
    int64_t pitch;
    Activation activation = Activation::kNone;
    bool is_gated = false;               // panels are gate and up in turns: out = activation(gate) * up
    const uint16_t* residual = nullptr;  // added after rounding, as a layer of its own would; pitch as of `out`

    template <class Format>
    void write(const Weights& w, const PackedRows<Format>& packed, const uint32_t* sums, int64_t tile, int64_t group) const {
        const int64_t output = group * kOutputsAtOnce, end = packed.tiles.begin(tile) + packed.tiles.size(tile);
        for (int64_t row = packed.tiles.begin(tile); row < end; ++row, sums += kOutputsAtOnce) {
            const float scale = packed.scale(row);
            const auto value = [&](int panel) {
                const int64_t at = output + panel * kLanes;
                return biased(w, Format::value(w, sums + panel * kLanes, at, scale), at);
            };
            if (is_gated) {
                put(row, output / 2, kLanes, activated(value(0), activation) * value(1));
                continue;
            }
            for (int panel = 0; panel < kPanels && output + panel * kLanes < w.outputs; ++panel) {
                const int64_t at = output + panel * kLanes;
                const int count = static_cast<int>(std::min<int64_t>(kLanes, w.outputs - at));
                put(row, at, count, activated(value(panel), activation));
            }
        }
    }

  private:
    static Vector biased(const Weights& w, Vector sums, int64_t output) {
        return w.bias == nullptr ? sums : sums + load_some(w.bias + output, w.outputs - output);
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
template <class Format, int kRows, int kCount, bool kIsFew>
void multiply_tile(const uint32_t* rows, const uint32_t* panels, int64_t words, const char* ahead, uint32_t* sums) {
    __m512i sum[kRows][kCount];
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
        for (int each = 0; each < kCount; ++each) sum[row][each] = _mm512_setzero_si512();
    }
    for (int64_t word = 0; word < words; ++word) {
        __m512i weights[kCount];
#pragma GCC unroll 2
        for (int each = 0; each < kCount; ++each) {
            const uint32_t* from = panels + (each * words + word) * kLanes;
            weights[each] = _mm512_loadu_si512(from);
            if (kIsFew) __builtin_prefetch(reinterpret_cast<const char*>(from) + kAheadBytes);
        }
        if (!kIsFew) __builtin_prefetch(ahead + word * 64, 0, 2);
#pragma GCC unroll 16
        for (int row = 0; row < kRows; ++row) {
            const __m512i both = _mm512_set1_epi32(static_cast<int>(rows[word * kRows + row]));
#pragma GCC unroll 2
            for (int each = 0; each < kCount; ++each) sum[row][each] = Format::add(sum[row][each], both, weights[each]);
        }
    }
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
        for (int each = 0; each < kCount; ++each) {
            _mm512_storeu_si512(sums + row * kOutputsAtOnce + each * kLanes, sum[row][each]);
        }
    }
}

using TileFunction = void (*)(const uint32_t*, const uint32_t*, int64_t, const char*, uint32_t*);

template <class Format, int kCount, bool kIsFew, int... kRows>
TileFunction tile_function(int rows, std::integer_sequence<int, kRows...>) {
    static constexpr TileFunction kTileOf[] = {multiply_tile<Format, kRows + 1, kCount, kIsFew>...};
    return kTileOf[rows - 1];
}

template <class Format>
struct Multiplier {
    explicit Multiplier(const PackedRows<Format>&) {}

    // Sums [rows of the tile][32] of two panels, or of the one that is left.
    void multiply(const Weights& w, const PackedRows<Format>& rows, int64_t tile, int64_t group, uint32_t* sums) const {
        const int64_t panel = rows.words * kLanes;
        const uint32_t* panels = w.panels + group * kPanels * panel;
        // Each of the first tiles asks for one of the next two panels.
        const bool asks = tile < kPanels && group + 1 < w.groups();
        const char* ahead = reinterpret_cast<const char*>(asks ? panels + (kPanels + tile) * panel : panels);
        const bool is_whole = group * kOutputsAtOnce + kLanes < w.outputs;
        const int count = rows.tiles.size(tile);
        const TileFunction run = rows.tiles.count == 1 ? (is_whole ? function<2, true>(count) : function<1, true>(count))
                                                       : (is_whole ? function<2, false>(count) : function<1, false>(count));
        run(rows.tile(tile), panels, rows.words, ahead, sums);
    }

  private:
    template <int kCount, bool kIsFew>
    static TileFunction function(int rows) {
        return tile_function<Format, kCount, kIsFew>(rows, std::make_integer_sequence<int, kRowsOfTile>());
    }
};

#elif PROMPTPLEX_PRODUCTS == 2

constexpr int kAheadBytes = 4096;

// Up to 32 rows and two panels: four tiles of sums. A thread's tiles are its own.
template <class Format>
class Multiplier {
  public:
    explicit Multiplier(const PackedRows<Format>& rows) { configure_tiles(static_cast<int>(std::min<int64_t>(rows.tiles.rows, kTileRows))); }
    ~Multiplier() { release_tiles(); }
    Multiplier(const Multiplier&) = delete;

    void multiply(const Weights& w, const PackedRows<Format>& rows, int64_t tile, int64_t group, uint32_t* sums) const {
        const uint32_t* panels = w.panels + group * kPanels * rows.words * kLanes;
        const bool is_whole = group * kOutputsAtOnce + kLanes < w.outputs;
        const uint32_t* packed = rows.tile(tile);
        if (rows.tiles.size(tile) > kTileRows) {
            is_whole ? run<2, 2>(packed, panels, rows.words, sums) : run<2, 1>(packed, panels, rows.words, sums);
        } else {
            is_whole ? run<1, 2>(packed, panels, rows.words, sums) : run<1, 1>(packed, panels, rows.words, sums);
        }
    }

  private:
    // Tiles: sums 0 to 3 (row half, panel), rows 4 and 5, panels 6 and 7.
    template <int kHalves, int kCount>
    static void run(const uint32_t* rows, const uint32_t* panels, int64_t words, uint32_t* sums) {
        zero_tile<0>();
        if (kCount == 2) zero_tile<1>();
        if (kHalves == 2) zero_tile<2>();
        if (kHalves == 2 && kCount == 2) zero_tile<3>();
        const int64_t pitch = words * sizeof *rows;
        for (int64_t word = 0; word < words; word += kWordsAtOnce) {
            const uint32_t* first = panels + word * kLanes;
            ask(first);
            load_tile<6>(first, kTileBytes);
            load_tile<4>(rows + word, pitch);
            Format::template add<0, 4, 6>();
            if (kCount == 2) {
                const uint32_t* second = first + words * kLanes;
                ask(second);
                load_tile<7>(second, kTileBytes);
                Format::template add<1, 4, 7>();
            }
            if (kHalves == 2) {
                load_tile<5>(rows + kTileRows * words + word, pitch);
                Format::template add<2, 5, 6>();
                if (kCount == 2) Format::template add<3, 5, 7>();
            }
        }
        constexpr int64_t kPitch = kOutputsAtOnce * sizeof *sums;
        store_tile<0>(sums, kPitch);
        if (kCount == 2) store_tile<1>(sums + kLanes, kPitch);
        if (kHalves == 2) store_tile<2>(sums + kTileRows * kOutputsAtOnce, kPitch);
        if (kHalves == 2 && kCount == 2) store_tile<3>(sums + kTileRows * kOutputsAtOnce + kLanes, kPitch);
    }

    // The lines of a panel's next tiles but some.
    static void ask(const uint32_t* from) {
        const char* line = reinterpret_cast<const char*>(from) + kAheadBytes;
        for (int each = 0; each < kTileRows; ++each) __builtin_prefetch(line + each * kTileBytes);
    }
};

#endif

#if PROMPTPLEX_PRODUCTS

// One thread's share of a product: groups [begin, end) of two panels, with all rows.
template <class Format>
void multiply(const Weights& w, const PackedRows<Format>& rows, int64_t begin, int64_t end, const Finish& finish) {
    const Multiplier<Format> multiplier(rows);
    alignas(64) uint32_t sums[kRowsOfTile * kOutputsAtOnce];
    for (int64_t block = 0; block < rows.tiles.count; block += kTilesAtOnce) {
        const int64_t last = std::min(rows.tiles.count, block + kTilesAtOnce);
        for (int64_t group = begin; group < end; ++group) {
            for (int64_t tile = block; tile < last; ++tile) {
                multiplier.multiply(w, rows, tile, group, sums);
                finish.write(w, rows, sums, tile, group);
            }
        }
    }
}

#endif

}  // namespace
