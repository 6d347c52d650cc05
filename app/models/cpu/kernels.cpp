// Kernels for bf16 models on CPUs. Plain C symbols, called through ctypes (library.py).
//
// Shapes: T packed tokens, H query heads, Hk kv heads, G = H / Hk, D key width, Dv value width,
// S slots, N rows. bf16 numbers travel as uint16_t; all arithmetic is in float.
//
// Vectors use GCC's and clang's extension, which becomes AVX-512, AVX2 or NEON as -march says.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr int kLanes = 16;
constexpr int kContextBlock = 256;  // context slots with scores held at once
constexpr int kRows = 56;           // query rows (tokens x heads of a group) that share a pass over K and V
constexpr int kRowsAtOnce = 8;      // of which so many are multiplied at once; divides kRows
constexpr int kAhead = 2 * kLanes;  // how many slots ahead of their use keys are asked for
constexpr int kLineHalves = 32;     // bf16 numbers in a cache line
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Integers __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef uint16_t Halves __attribute__((vector_size(kLanes * sizeof(uint16_t))));
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

// Rows of a 16 x 16 block become its columns: blocks of 8, 4, 2 and 1 change places.
inline void transpose(Vector* r) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        const Vector a = r[i], b = r[i + 8];
        r[i] = pick<0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23>(a, b);
        r[i + 8] = pick<8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31>(a, b);
    }
#pragma GCC unroll 8
    for (int pair = 0; pair < 8; ++pair) {
        const int i = pair / 4 * 8 + pair % 4;
        const Vector a = r[i], b = r[i + 4];
        r[i] = pick<0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27>(a, b);
        r[i + 4] = pick<4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31>(a, b);
    }
#pragma GCC unroll 8
    for (int pair = 0; pair < 8; ++pair) {
        const int i = pair / 2 * 4 + pair % 2;
        const Vector a = r[i], b = r[i + 2];
        r[i] = pick<0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29>(a, b);
        r[i + 2] = pick<2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31>(a, b);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        const Vector a = r[i], b = r[i + 1];
        r[i] = pick<0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30>(a, b);
        r[i + 1] = pick<1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31>(a, b);
    }
}

struct Attention {
    const uint16_t* query;  // [T, H, D] by strides, D contiguous
    int64_t token_stride, head_stride;
    const uint16_t* keys;    // [S, Hk * D]
    const uint16_t* values;  // [S, Hk * Dv]
    uint16_t* out;           // [T, H, Dv]
    const int64_t* slots;        // of all items, one after the other
    const int64_t* slot_begin;   // [items + 1]
    const int64_t* token_begin;  // [items + 1]
    int64_t heads, kv_heads, width, value_width, window;
    float scale;
};

// Some query tokens of one sequence and the heads of one group: they attend to the same K and V.
struct Task {
    int64_t item, kv_head, first, count;  // tokens [first, first + count) of the item
};

// What a thread needs for a task; sized once.
struct Scratch {
    std::vector<float> query;   // [kRows / kRowsAtOnce, width, kRowsAtOnce], scaled
    std::vector<float> keys;    // [width, kLanes]
    std::vector<float> values;  // [kLanes, value_width]
    std::vector<float> scores;  // [kRows, kContextBlock]
    std::vector<float> sums;    // [kRows, value_width]
    float most[kRows], weight[kRows];
    int begin[kRows], end[kRows];  // slots of the block that a row sees

    Scratch(int64_t width, int64_t value_width)
        : query(kRows * width),
          keys(width * kLanes),
          values(kLanes * value_width),
          scores(kRows * kContextBlock),
          sums(kRows * value_width) {}
};

class Worker {
  public:
    Worker(const Attention& given) : a(given), group(given.heads / given.kv_heads), s(given.width, given.value_width) {}

    void run(const Task& task) {
        const int64_t* slots = a.slots + a.slot_begin[task.item];
        const int64_t length = a.slot_begin[task.item + 1] - a.slot_begin[task.item];
        const int64_t tokens = a.token_begin[task.item + 1] - a.token_begin[task.item];
        const int64_t computed = length - tokens;  // slots that earlier steps filled
        rows = static_cast<int>(task.count * group);
        gather_queries(task);
        const int64_t begin = first_visible(computed + task.first);
        const int64_t end = computed + task.first + task.count;
        for (int64_t at = begin; at < end; at += kContextBlock) {
            const int count = static_cast<int>(std::min<int64_t>(kContextBlock, end - at));
            score(task.kv_head, slots + at, count);
            hide(computed + task.first, at, count);
            weigh(count);
            add_values(task.kv_head, slots + at, count);
        }
        write(task);
    }

  private:
    const Attention& a;
    const int64_t group;
    Scratch s;
    int rows = 0;

    int64_t first_visible(int64_t slot) const {
        return a.window == 0 ? 0 : std::max<int64_t>(0, slot + 1 - a.window);
    }

    void gather_queries(const Task& task) {
        for (int row = 0; row < rows; ++row) {
            const int64_t token = a.token_begin[task.item] + task.first + row / group;
            const int64_t head = task.kv_head * group + row % group;
            const uint16_t* from = a.query + token * a.token_stride + head * a.head_stride;
            float* to = s.query.data() + row / kRowsAtOnce * kRowsAtOnce * a.width + row % kRowsAtOnce;
            for (int64_t d = 0; d < a.width; ++d) to[d * kRowsAtOnce] = to_float(from[d]) * a.scale;
        }
        std::fill(s.most, s.most + rows, kMinusInfinity);
        std::fill(s.weight, s.weight + rows, 0.0f);
        std::fill(s.sums.begin(), s.sums.begin() + rows * a.value_width, 0.0f);
    }

    // Scores of `count` slots, 16 at a time: K is turned so that a vector holds one number of 16 slots.
    void score(int64_t kv_head, const int64_t* slots, int count) {
        const int64_t pitch = a.kv_heads * a.width;
        for (int at = 0; at < kAhead; at += kLanes) fetch(a.keys, pitch, kv_head, a.width, slots, at, count);
        for (int at = 0; at < count; at += kLanes) {
            fetch(a.keys, pitch, kv_head, a.width, slots, at + kAhead, count);
            fetch(a.values, a.kv_heads * a.value_width, kv_head, a.value_width, slots, at, count);
            const uint16_t* key[kLanes];
            for (int lane = 0; lane < kLanes; ++lane) {
                // Beyond the last slot a lane repeats it; `hide` takes its score away.
                key[lane] = a.keys + slots[std::min(at + lane, count - 1)] * pitch + kv_head * a.width;
            }
            for (int64_t d = 0; d < a.width; d += kLanes) {
                Vector block[kLanes];
                for (int lane = 0; lane < kLanes; ++lane) block[lane] = load_halves(key[lane] + d);
                transpose(block);
                for (int lane = 0; lane < kLanes; ++lane) store(s.keys.data() + (d + lane) * kLanes, block[lane]);
            }
            for (int row = 0; row < rows; row += kRowsAtOnce) score_rows(row, at);
        }
    }

    // Ask for 16 slots' lines early: slots lie anywhere, and the processor can't guess which come next.
    void fetch(const uint16_t* pool, int64_t pitch, int64_t kv_head, int64_t width, const int64_t* slots, int at,
               int count) const {
        const int end = std::min(at + kLanes, count);
        for (; at < end; ++at) {
            const uint16_t* from = pool + slots[at] * pitch + kv_head * width;
            for (int64_t d = 0; d < width; d += kLineHalves) __builtin_prefetch(from + d);
        }
    }

    // Rows beyond the last are computed too, for nothing: independent sums keep the multipliers busy.
    void score_rows(int row, int at) {
        Vector sums[kRowsAtOnce] = {};
        const float* query = s.query.data() + row * a.width;
        const float* keys = s.keys.data();
        for (int64_t d = 0; d < a.width; ++d, query += kRowsAtOnce, keys += kLanes) {
            const Vector key = load(keys);
            for (int each = 0; each < kRowsAtOnce; ++each) sums[each] += query[each] * key;
        }
        for (int each = 0; each < kRowsAtOnce; ++each) store(score_of(row + each) + at, sums[each]);
    }

    float* score_of(int row) { return s.scores.data() + row * kContextBlock; }

    // Causality, the window, and the lanes that fill up the last vector.
    void hide(int64_t first_slot, int64_t at, int count) {
        const int padded = (count + kLanes - 1) / kLanes * kLanes;
        for (int row = 0; row < rows; ++row) {
            const int64_t slot = first_slot + row / group;
            const int64_t begin = std::clamp<int64_t>(first_visible(slot) - at, 0, count);
            const int64_t end = std::clamp<int64_t>(slot + 1 - at, begin, count);
            std::fill(score_of(row), score_of(row) + begin, kMinusInfinity);
            std::fill(score_of(row) + end, score_of(row) + padded, kMinusInfinity);
            s.begin[row] = static_cast<int>(begin);
            s.end[row] = static_cast<int>(end);
        }
    }

    // Scores become weights relative to the largest so far; what was summed before is scaled down to it.
    void weigh(int count) {
        for (int row = 0; row < rows; ++row) {
            float* scores = score_of(row);
            Vector most = load(scores);
            for (int at = kLanes; at < count; at += kLanes) {
                const Vector other = load(scores + at);
                most = other > most ? other : most;
            }
            const float before = s.most[row];
            const float now = std::max(before, largest(most));
            // Nothing of this block is visible to the row, nor was anything before.
            const float base = now == kMinusInfinity ? 0.0f : now;
            Vector sum{};
            for (int at = 0; at < count; at += kLanes) {
                const Vector raw = load(scores + at);
                // A hidden slot weighs nothing at all, so that no amount of them adds up to something.
                const Vector weights = raw == kMinusInfinity ? Vector{} : exponential(raw - base);
                store(scores + at, weights);
                sum += weights;
            }
            const float shrink = before == kMinusInfinity ? 0.0f : std::exp(before - base);
            s.weight[row] = s.weight[row] * shrink + total(sum);
            s.most[row] = now;
            float* sums = s.sums.data() + row * a.value_width;
            if (shrink != 1.0f) {
                for (int64_t d = 0; d < a.value_width; ++d) sums[d] *= shrink;
            }
        }
    }

    void add_values(int64_t kv_head, const int64_t* slots, int count) {
        const int64_t pitch = a.kv_heads * a.value_width;
        for (int at = 0; at < count; at += kLanes) {
            const int present = std::min(kLanes, count - at);
            for (int lane = 0; lane < present; ++lane) {
                const uint16_t* value = a.values + slots[at + lane] * pitch + kv_head * a.value_width;
                float* to = s.values.data() + lane * a.value_width;
                for (int64_t d = 0; d < a.value_width; d += kLanes) store(to + d, load_halves(value + d));
            }
            for (int row = 0; row < rows; ++row) add_row(row, at);
        }
    }

    // 0 x NaN is NaN: a slot that the row doesn't see is left out, not multiplied by 0.
    void add_row(int row, int at) {
        const int begin = std::max(s.begin[row] - at, 0), end = std::min(s.end[row] - at, kLanes);
        const float* weights = score_of(row) + at;
        float* sums = s.sums.data() + row * a.value_width;
        int64_t d = 0;
        for (; d + 4 * kLanes <= a.value_width; d += 4 * kLanes) add_columns<4>(weights, sums + d, d, begin, end);
        for (; d < a.value_width; d += kLanes) add_columns<1>(weights, sums + d, d, begin, end);
    }

    template <int kCount>
    void add_columns(const float* weights, float* to, int64_t d, int begin, int end) {
        Vector sums[kCount];
        for (int each = 0; each < kCount; ++each) sums[each] = load(to + each * kLanes);
        const float* value = s.values.data() + begin * a.value_width + d;
        for (int lane = begin; lane < end; ++lane, value += a.value_width) {
            for (int each = 0; each < kCount; ++each) sums[each] += weights[lane] * load(value + each * kLanes);
        }
        for (int each = 0; each < kCount; ++each) store(to + each * kLanes, sums[each]);
    }

    void write(const Task& task) {
        for (int row = 0; row < rows; ++row) {
            const int64_t token = a.token_begin[task.item] + task.first + row / group;
            const int64_t head = task.kv_head * group + row % group;
            uint16_t* to = a.out + (token * a.heads + head) * a.value_width;
            const float* sums = s.sums.data() + row * a.value_width;
            for (int64_t d = 0; d < a.value_width; d += kLanes) store_halves(to + d, load(sums + d) / s.weight[row]);
        }
    }
};

}  // namespace

extern "C" {

// Causal attention of packed tokens over resident keys and values. Widths are multiples of 16; H / Hk <= 56.
void promptplex_attention(
    const uint16_t* query, int64_t token_stride, int64_t head_stride, const uint16_t* keys, const uint16_t* values,
    uint16_t* out, const int64_t* slots, const int64_t* slot_begin, const int64_t* token_begin, int64_t items,
    int64_t heads, int64_t kv_heads, int64_t width, int64_t value_width, int64_t window, float scale, int threads) {
    const Attention attention{query, token_stride, head_stride, keys, values, out, slots, slot_begin,
                              token_begin, heads, kv_heads, width, value_width, window, scale};
    const int64_t tokens_at_once = std::max<int64_t>(1, kRows / (heads / kv_heads));
    std::vector<Task> tasks;
    for (int64_t item = 0; item < items; ++item) {
        const int64_t tokens = token_begin[item + 1] - token_begin[item];
        for (int64_t first = 0; first < tokens; first += tokens_at_once) {
            for (int64_t kv_head = 0; kv_head < kv_heads; ++kv_head) {
                tasks.push_back({item, kv_head, first, std::min(tokens_at_once, tokens - first)});
            }
        }
    }
#pragma omp parallel num_threads(threads)
    {
        Worker worker(attention);
#pragma omp for schedule(dynamic, 1)
        for (size_t task = 0; task < tasks.size(); ++task) worker.run(tasks[task]);
    }
}

// out = silu(gate) * up, element by element. `out` may be `gate`.
void promptplex_silu_times(const uint16_t* gate, const uint16_t* up, uint16_t* out, int64_t count, int threads) {
    const int64_t whole = count / kLanes * kLanes;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t at = 0; at < whole; at += kLanes) {
        const Vector x = load_halves(gate + at);
        const Vector size = x < 0.0f ? x : -x;  // -|x|, and NaN for NaN
        const Vector small = exponential(size);
        const Vector sigmoid = (x < 0.0f ? small : splat(1.0f)) / (small + 1.0f);
        store_halves(out + at, x * sigmoid * load_halves(up + at));
    }
    for (int64_t at = whole; at < count; ++at) {
        const float x = to_float(gate[at]);
        out[at] = to_half(x / (1.0f + std::exp(-x)) * to_float(up[at]));
    }
}

// Root mean square normalisation of rows [N, d], as transformers rounds it: to bf16 before the weight, and after.
void promptplex_rms_norm(
    const uint16_t* in, const uint16_t* weight, uint16_t* out, int64_t rows, int64_t width, float epsilon,
    int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; ++row) {
        const uint16_t* from = in + row * width;
        uint16_t* to = out + row * width;
        Vector squares{};
        for (int64_t d = 0; d < width; d += kLanes) {
            const Vector x = load_halves(from + d);
            squares += x * x;
        }
        const float scale = 1.0f / std::sqrt(total(squares) / static_cast<float>(width) + epsilon);
        for (int64_t d = 0; d < width; d += kLanes) {
            uint16_t rounded[kLanes];
            store_halves(rounded, load_halves(from + d) * scale);
            store_halves(to + d, load_halves(weight + d) * load_halves(rounded));
        }
    }
}

}  // extern "C"
