// Vectors of 16 floats, bf16 numbers, and what is computed with them.
//
// Vectors use GCC's and clang's extension, which becomes AVX-512, AVX2 or NEON as -march says.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace {

constexpr int kLanes = 16;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504f;

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Integers __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef uint16_t Halves __attribute__((vector_size(kLanes * sizeof(uint16_t))));
typedef uint8_t Octets __attribute__((vector_size(kLanes * sizeof(uint8_t))));
typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(uint32_t))));

inline float to_float(uint16_t half) {
    const uint32_t word = static_cast<uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &word, sizeof value);
    return value;
}

// Round to nearest, ties to even; NaN stays NaN.
inline uint16_t to_half(float value) {
    uint32_t word;
    std::memcpy(&word, &value, sizeof word);
    if (std::isnan(value)) return static_cast<uint16_t>((word >> 16) | 0x40);
    return static_cast<uint16_t>((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

inline Vector load(const float* from) {
    Vector value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

inline void store(float* to, Vector value) { std::memcpy(to, &value, sizeof value); }

inline Vector load_halves(const uint16_t* from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    const Words words = __builtin_convertvector(halves, Words) << 16;
    Vector value;
    std::memcpy(&value, &words, sizeof value);
    return value;
}

inline void store_halves(uint16_t* to, Vector value) {
    Words words;
    std::memcpy(&words, &value, sizeof words);
    const Words rounded = (words + 0x7fff + ((words >> 16) & 1)) >> 16;
    const Words is_nan = reinterpret_cast<Words>(value != value);
    const Words chosen = (is_nan & ((words >> 16) | 0x40)) | (~is_nan & rounded);
    const Halves halves = __builtin_convertvector(chosen, Halves);
    std::memcpy(to, &halves, sizeof halves);
}

inline Vector splat(float value) { return value - Vector{}; }

// e^x for x <= 0 within 2 units in the last place; NaN stays NaN. 2^n times a polynomial of the rest.
inline Vector exponential(Vector x) {
    const Vector low = splat(-87.0f);
    x = x < low ? low : x;
    const Vector magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const Vector whole = (x * 1.44269504f + magic) - magic;
    const Vector rest = (x - whole * 0.693145752f) - whole * 1.42860677e-6f;
    Vector sum = splat(1.98756915e-4f);
    sum = sum * rest + 1.39819995e-3f;
    sum = sum * rest + 8.33345205e-3f;
    sum = sum * rest + 4.16657962e-2f;
    sum = sum * rest + 1.66666655e-1f;
    sum = sum * rest + 5.00000012e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    const Integers exponent = (__builtin_convertvector(whole, Integers) + 127) << 23;
    Vector power;
    std::memcpy(&power, &exponent, sizeof power);
    return sum * power;
}

inline float largest(Vector value) {
    float most = value[0];
    for (int lane = 1; lane < kLanes; ++lane) most = value[lane] > most ? value[lane] : most;
    return most;
}

inline float total(Vector value) {
    float sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum += value[lane];
    return sum;
}

template <int... kIndices>
inline Vector pick(Vector a, Vector b) {
    return __builtin_shufflevector(a, b, kIndices...);
}

// Two vectors exchange runs of lanes: the first one keeps the even runs of both, the second one the odd ones.
inline void exchange_8(Vector& r, Vector& s) {
    const Vector a = r, b = s;
    r = pick<0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23>(a, b);
    s = pick<8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31>(a, b);
}

inline void exchange_4(Vector& r, Vector& s) {
    const Vector a = r, b = s;
    r = pick<0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27>(a, b);
    s = pick<4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31>(a, b);
}

inline void exchange_2(Vector& r, Vector& s) {
    const Vector a = r, b = s;
    r = pick<0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29>(a, b);
    s = pick<2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31>(a, b);
}

inline void exchange_1(Vector& r, Vector& s) {
    const Vector a = r, b = s;
    r = pick<0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30>(a, b);
    s = pick<1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31>(a, b);
}

// Rows of a 16 x 16 block become its columns: blocks of 8, 4, 2 and 1 change places.
inline void transpose(Vector* r) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) exchange_8(r[i], r[i + 8]);
#pragma GCC unroll 8
    for (int pair = 0; pair < 8; ++pair) exchange_4(r[pair / 4 * 8 + pair % 4], r[pair / 4 * 8 + pair % 4 + 4]);
#pragma GCC unroll 8
    for (int pair = 0; pair < 8; ++pair) exchange_2(r[pair / 2 * 4 + pair % 2], r[pair / 2 * 4 + pair % 2 + 2]);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) exchange_1(r[i], r[i + 1]);
}

// The total of each of 16 vectors, in a vector: a transposition that adds what it has exchanged.
inline Vector totals(Vector* r) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) exchange_8(r[i], r[i + 8]), r[i] += r[i + 8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) exchange_4(r[i], r[i + 4]), r[i] += r[i + 4];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) exchange_2(r[i], r[i + 2]), r[i] += r[i + 2];
    exchange_1(r[0], r[1]);
    return r[0] + r[1];
}

}  // namespace
