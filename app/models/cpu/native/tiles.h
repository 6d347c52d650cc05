// Matrix tiles: eight registers of up to 16 rows of 64 bytes, and products of them.
//
// Intel's AMX where the compiler's target has it (__AMX_BF16__); with PROMPTPLEX_EMULATE_TILES plain loops that do
// the same, so that what is built on tiles can be tested on any machine. PROMPTPLEX_TILES says whether there are any.
//
// A product adds A [rows, 32] times B [32, 16] in bf16 to a tile of sums [rows, 16] in float. A lies row by row. B
// lies in pairs: row i of its tile holds B[2i][0], B[2i + 1][0], B[2i][1], B[2i + 1][1], ... An AVX-512 register of
// `vdpbf16ps` holds one such row, so both kinds of kernel read one packed layout: [K / 2][16 columns][2].
//
// With bytes a product adds A [rows, 64], unsigned, times B [64, 16], signed, to integers of 32 bits: row i of B's
// tile holds B[4i][0], ..., B[4i + 3][0], B[4i][1], ... PROMPTPLEX_BYTE_TILES says whether there are such products.
//
// A thread configures its tiles before the first use, and releases them after the last: other libraries (oneDNN)
// configure the same registers for themselves.

#pragma once

#if defined(PROMPTPLEX_EMULATE_TILES)
#define PROMPTPLEX_TILES 1
#elif defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__) && defined(__x86_64__)
#define PROMPTPLEX_TILES 1
#include <sys/syscall.h>
#include <unistd.h>
#else
#define PROMPTPLEX_TILES 0
#endif

#if defined(PROMPTPLEX_EMULATE_TILES) || (PROMPTPLEX_TILES && defined(__AMX_INT8__))
#define PROMPTPLEX_BYTE_TILES 1
#else
#define PROMPTPLEX_BYTE_TILES 0
#endif

#if PROMPTPLEX_TILES

#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace {

constexpr int kTileRows = 16;
constexpr int kTileBytes = 64;               // in a row
constexpr int kTileHalves = kTileBytes / 2;  // bf16 numbers in a row
constexpr int kTiles = 8;
constexpr int kFirstFullTile = 6;  // tiles 6 and 7 have all rows: they are for B

#if defined(PROMPTPLEX_EMULATE_TILES)

struct EmulatedTiles {
    int rows[kTiles];  // 0: not configured
    uint8_t bytes[kTiles][kTileRows * kTileBytes];
};

inline EmulatedTiles& emulated() {
    static thread_local EmulatedTiles tiles{};
    return tiles;
}

inline bool are_tiles_permitted() { return true; }

inline void configure_tiles(int rows) {
    EmulatedTiles& tiles = emulated();
    std::memset(&tiles, 0, sizeof tiles);
    for (int tile = 0; tile < kTiles; ++tile) tiles.rows[tile] = tile < kFirstFullTile ? rows : kTileRows;
}

inline void release_tiles() { std::memset(&emulated(), 0, sizeof(EmulatedTiles)); }

template <int kTile>
inline void zero_tile() {
    std::memset(emulated().bytes[kTile], 0, kTileRows * kTileBytes);
}

template <int kTile>
inline void load_tile(const void* from, int64_t stride) {
    EmulatedTiles& tiles = emulated();
    for (int row = 0; row < tiles.rows[kTile]; ++row) {
        const uint8_t* line = static_cast<const uint8_t*>(from) + row * stride;
        std::memcpy(tiles.bytes[kTile] + row * kTileBytes, line, kTileBytes);
    }
}

template <int kTile>
inline void store_tile(void* to, int64_t stride) {
    const EmulatedTiles& tiles = emulated();
    for (int row = 0; row < tiles.rows[kTile]; ++row) {
        std::memcpy(static_cast<uint8_t*>(to) + row * stride, tiles.bytes[kTile] + row * kTileBytes, kTileBytes);
    }
}

template <int kSums, int kA, int kB>
inline void multiply_tiles() {
    EmulatedTiles& tiles = emulated();
    const uint16_t* a = reinterpret_cast<const uint16_t*>(tiles.bytes[kA]);
    const uint16_t* b = reinterpret_cast<const uint16_t*>(tiles.bytes[kB]);
    float* sums = reinterpret_cast<float*>(tiles.bytes[kSums]);
    for (int row = 0; row < tiles.rows[kSums]; ++row) {
        for (int pair = 0; pair < kTileRows; ++pair) {
            for (int column = 0; column < kLanes; ++column) {
                const uint16_t* left = a + row * kTileHalves + 2 * pair;
                const uint16_t* right = b + pair * kTileHalves + 2 * column;
                sums[row * kLanes + column] += to_float(left[0]) * to_float(right[0]);
                sums[row * kLanes + column] += to_float(left[1]) * to_float(right[1]);
            }
        }
    }
}

template <int kSums, int kA, int kB>
inline void multiply_byte_tiles() {
    EmulatedTiles& tiles = emulated();
    const uint8_t* a = tiles.bytes[kA];
    const int8_t* b = reinterpret_cast<const int8_t*>(tiles.bytes[kB]);
    int32_t* sums = reinterpret_cast<int32_t*>(tiles.bytes[kSums]);
    for (int row = 0; row < tiles.rows[kSums]; ++row) {
        for (int place = 0; place < kTileBytes; ++place) {
            for (int column = 0; column < kLanes; ++column) {
                const int right = b[place / 4 * kTileBytes + 4 * column + place % 4];
                sums[row * kLanes + column] += a[row * kTileBytes + place] * right;
            }
        }
    }
}

#else

// Ask the kernel, once a process, for the right to use tiles: their state makes a thread's context 8 KiB larger.
inline bool are_tiles_permitted() {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool permitted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    return permitted;
}

// Give tiles 0 to 5, which are for sums and A, so many rows.
inline void configure_tiles(int rows) {
    struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
    } shapes;
    for (int tile = 0; tile < kTiles; ++tile) {
        shapes.row_bytes[tile] = kTileBytes;
        shapes.rows[tile] = static_cast<uint8_t>(tile < kFirstFullTile ? rows : kTileRows);
    }
    asm volatile("ldtilecfg %0" ::"m"(shapes));
}

inline void release_tiles() { asm volatile("tilerelease"); }

template <int kTile>
inline void zero_tile() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

template <int kTile>
inline void load_tile(const void* from, int64_t stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(kTile), "r"(from), "r"(stride) : "memory");
}

template <int kTile>
inline void store_tile(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(kTile), "r"(to), "r"(stride) : "memory");
}

template <int kSums, int kA, int kB>
inline void multiply_tiles() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kA), "i"(kB));
}

#if PROMPTPLEX_BYTE_TILES
template <int kSums, int kA, int kB>
inline void multiply_byte_tiles() {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kA), "i"(kB));
}
#endif

#endif

}  // namespace

#endif  // PROMPTPLEX_TILES
