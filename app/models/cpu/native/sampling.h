// Choosing a row's next token, with the very numbers that torch would compute.
//
// Shapes: n logits of a row. A draw is decided without sorting the row: the tokens that count are narrowed down to
// the few around the sought share of the probability. Exponentials and logarithms are MKL's, as in torch; float32
// sums are added up in torch's order, and tokens of equal logits stand in the order in which torch puts them.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "selection.h"
#include "vectors.h"

namespace {

using VectorMath = void (*)(int, const float*, float*, int64_t);  // MKL's vmsExp and vmsLn
using SoftmaxExp = Vector (*)(Vector);  // the e^x of torch's softmax, from Sleef
constexpr int64_t kAccurate = 0x2 | 0x100 | 0x140000;  // VML_HA | VML_ERRMODE_IGNORE | VML_FTZDAZ_OFF
constexpr int64_t kCandidates = 1024;                   // that a partial selection looks at, as in draws.py
constexpr double kMargin = 1e-10;  // sums of float64 in different orders agree better than this
constexpr int64_t kBlock = 512;    // tokens of the two-level search of a plain draw, as in draws.py
constexpr int64_t kLeaf = 64;      // tokens that are sorted rather than narrowed down

struct Edit {
    int64_t operation;
    const int64_t* begin;  // [N + 1]: of each row's entries
    const int64_t* ids;
    const float* values;
};
enum Operation { kAdd, kScale, kSet, kForce, kGain };

enum Draw { kGreedy, kFiltered, kPlain };

struct Row {
    double uniform, temperature, top_p, min_p;
    int64_t top_k, num_top, draw;
    const uint32_t* mask;  // null: every token may come
    int64_t mask_words;
    int64_t token;  // chosen; below 0: none, torch has to choose
    double logprob;
};

struct Scored {
    float value;
    int32_t id;
};
constexpr auto comes_first = [](const Scored& a, const Scored& b) { return a.value > b.value; };

// Write the chosen lanes side by side; up to 16 numbers behind them are overwritten.
inline void compress(float* to, Vector value, uint32_t bits) {
#if defined(__AVX512F__)
    _mm512_storeu_ps(to, _mm512_maskz_compress_ps(static_cast<__mmask16>(bits), (__m512)value));
#else
    for (int lane = 0; lane < kLanes; ++lane) {
        *to = value[lane];
        to += bits >> lane & 1;
    }
#endif
}

// The sum of x[0 .. n) in the order of torch's reduction: 4 accumulators of 8 lanes, cascaded in 4 levels.
inline float sum_as_torch(const float* x, int64_t n) {
    typedef float Lanes __attribute__((vector_size(32)));
    const auto at = [x](int64_t index) {
        Lanes value;
        std::memcpy(&value, x + index * 8, sizeof value);
        return value;
    };
    const int64_t vectors = n / 8, groups = vectors / 4;
    int64_t log2 = 0;
    while (int64_t{1} << log2 < groups) ++log2;
    const int64_t power = std::max<int64_t>(4, log2 / 4), step = int64_t{1} << power;
    Lanes sums[4][4] = {};
    int64_t i = 0;
    while (i + step <= groups) {
        for (int64_t end = i + step; i < end; ++i) {
            for (int k = 0; k < 4; ++k) sums[0][k] += at(i * 4 + k);
        }
        for (int level = 1; level < 4; ++level) {
            for (int k = 0; k < 4; ++k) sums[level][k] += sums[level - 1][k], sums[level - 1][k] = Lanes{};
            if (i & (step - 1) << level * power) break;
        }
    }
    for (; i < groups; ++i) {
        for (int k = 0; k < 4; ++k) sums[0][k] += at(i * 4 + k);
    }
    for (int level = 1; level < 4; ++level) {
        for (int k = 0; k < 4; ++k) sums[0][k] += sums[level][k];
    }
    for (int64_t index = groups * 4; index < vectors; ++index) sums[0][0] += at(index);
    for (int k = 1; k < 4; ++k) sums[0][0] += sums[0][k];
    float sum = 0;
    for (int64_t index = vectors * 8; index < n; ++index) sum += x[index];
    for (int lane = 0; lane < 8; ++lane) sum += sums[0][0][lane];
    return sum;
}

// The sum of x[0 .. n) in the order of torch's softmax: a vector of 16 sums, halved. Zeros follow x.
inline float sum_of_softmax(const float* x, int64_t n) {
    Vector sums = load(x);
    if (n < kLanes) {
        for (int64_t i = 1; i < n; ++i) sums[0] += sums[i];
        return sums[0];
    }
    for (int64_t i = kLanes; i < n; i += kLanes) sums += load(x + i);
    for (int width = kLanes / 2; width > 0; width /= 2) {
        for (int lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
    }
    return sums[0];
}

// Tokens of equal logits that share a place in a row's order.
struct Group {
    float value;
    double weight;   // of each
    double before;   // the weights of all tokens that come first
    int64_t place;   // of the first one
    int64_t size;    // 0: there is no such group
};

// One thread's memory and what it does with a row.
class Chooser {
  public:
    // Without `softmax_exp` (null) plain draws are left to torch.
    Chooser(VectorMath exponentials, VectorMath logarithms, SoftmaxExp softmax_exp, int64_t n)
        : exp_(exponentials), log_(logarithms), softmax_exp_(softmax_exp), n_(n) {
        for (auto* each : {&logits_, &buffer_, &values_, &weights_, &near_values_[0], &near_values_[1],
                           &near_weights_[0], &near_weights_[1]}) {
            each->resize(n + 2 * kLanes);
        }
    }

    template <typename Number>
    void choose(const Number* given, int64_t row_number, Row& row, const Edit* edits, int64_t num_edits,
                int64_t* top_ids, float* top_values) {
        row.token = -1;
        copy(given);
        const float most = maximum();
        if (!std::isfinite(most)) return;
        float log_sum = log_sum_exp(logits_.data(), n_, most);
        const float normaliser = log_sum + most;
        if (!std::isfinite(normaliser)) return;
        if (row.num_top > 0) report_top(normaliser, std::min(row.num_top, n_), top_ids, top_values);
        bool is_changed = row.mask != nullptr;
        for (int64_t number = 0; number < num_edits; ++number) is_changed |= edit(edits[number], row_number);
        if (row.mask != nullptr) ban_unmasked(row.mask, row.mask_words);
        const float highest = is_changed ? maximum() : most;
        if (!std::isfinite(highest)) return;
        row.token = row.draw != kGreedy ? draw(row, highest, log_sum, is_changed) : first_of(highest, 0);
        if (row.token >= 0) row.logprob = to_float_(given[row.token]) - normaliser;
    }

  private:
    static float to_float_(float value) { return value; }
    static float to_float_(uint16_t value) { return to_float(value); }

    void copy(const float* given) { std::memcpy(logits_.data(), given, n_ * sizeof(float)); }

    void copy(const uint16_t* given) {
        const int64_t whole = n_ / kLanes * kLanes;
        for (int64_t i = 0; i < whole; i += kLanes) store(&logits_[i], load_halves(given + i));
        for (int64_t i = whole; i < n_; ++i) logits_[i] = to_float(given[i]);
    }

    // NaN is passed over: it shows in the sum of exponentials.
    float maximum() {
        pad(logits_.data(), n_);
        Vector most[4];
        for (Vector& each : most) each = splat(kMinusInfinity);
        int64_t i = 0;
        for (; i + 4 * kLanes <= n_; i += 4 * kLanes) {
            for (int k = 0; k < 4; ++k) {
                const Vector x = load(&logits_[i + k * kLanes]);
                most[k] = x > most[k] ? x : most[k];
            }
        }
        for (; i < n_; i += kLanes) {
            const Vector x = load(&logits_[i]);
            most[0] = x > most[0] ? x : most[0];
        }
        for (int k = 1; k < 4; ++k) most[0] = most[k] > most[0] ? most[k] : most[0];
        return largest(most[0]);
    }

    // Fill up the last vector.
    static void pad(float* x, int64_t n) { std::fill(x + n, x + n + kLanes, kMinusInfinity); }

    // out = e^(x - shift)
    void exponentials(const float* x, int64_t n, float shift, float* out) const {
        constexpr int64_t kChunk = 2048;
        for (int64_t begin = 0; begin < n; begin += kChunk) {
            const int64_t end = std::min(n, begin + kChunk);
            for (int64_t i = begin; i < end; ++i) out[i] = x[i] - shift;
            exp_(static_cast<int>(end - begin), out + begin, out + begin, kAccurate);
        }
    }

    float log_of(float value) const {
        float out;
        log_(1, &value, &out, kAccurate);
        return out;
    }

    // log(sum(e^(x - shift)))
    float log_sum_exp(const float* x, int64_t n, float shift) {
        exponentials(x, n, shift, buffer_.data());
        return log_of(sum_as_torch(buffer_.data(), n));
    }

    bool edit(const Edit& edit, int64_t row) {
        const int64_t begin = edit.begin[row], end = edit.begin[row + 1];
        if (begin == end) return false;
        if (edit.operation == kForce) std::fill(&logits_[0], &logits_[n_], kMinusInfinity);
        if (end - begin > static_cast<int64_t>(buffer_.size())) buffer_.resize(end - begin);
        float* old = buffer_.data();  // an id may occur twice, so that there may be more of them than logits
        for (int64_t i = begin; i < end; ++i) old[i - begin] = logits_[edit.ids[i]];
        for (int64_t i = begin; i < end; ++i) {
            const float x = old[i - begin], value = edit.values[i];
            float& logit = logits_[edit.ids[i]];
            switch (edit.operation) {
                case kAdd: logit += value; break;
                case kScale: logit = x < 0 ? x * value : x / value; break;
                case kSet: logit = value; break;
                case kForce: logit = value; break;
                case kGain: {
                    const volatile float gain = std::abs(x) * value;  // rounded: not fused with the sum
                    logit = x + (std::isfinite(x) ? gain : 0.0f);
                    break;
                }
            }
        }
        return true;
    }

    void ban_unmasked(const uint32_t* mask, int64_t words) {
        for (int64_t id = 0; id < n_; ++id) {
            const bool is_allowed = id / 32 < words && (mask[id / 32] >> id % 32 & 1);
            logits_[id] = is_allowed ? logits_[id] : kMinusInfinity;
        }
    }

    // The id of occurrence number `skip` of a value; -1: there are fewer.
    int64_t first_of(float value, int64_t skip) const {
        for (int64_t i = 0; i < n_; i += kLanes) {
            const Vector x = load(&logits_[i]);
            uint32_t bits = ~(greater(x, splat(value)) | greater(splat(value), x)) & 0xffff;
            const int64_t count = __builtin_popcount(bits);
            if (skip >= count) {
                skip -= count;
                continue;
            }
            for (; skip > 0; --skip) bits &= bits - 1;
            return i + __builtin_ctz(bits);
        }
        return -1;
    }

    // The k best of x - shift, as torch's topk orders them.
    void select(const float* x, float shift, int64_t k) {
        if (k * 64 > n_ && selection_.take(x, shift, n_, k)) {
            best_.resize(k);
            for (int64_t i = 0; i < k; ++i) best_[i] = {selection_.value(i), selection_.id(i)};
            std::sort(best_.begin(), best_.begin() + (k - 1), comes_first);
            return;
        }
        if (k * 64 > n_) {
            best_.resize(n_);
            for (int64_t i = 0; i < n_; ++i) best_[i] = {x[i] - shift, static_cast<int32_t>(i)};
            std::nth_element(best_.begin(), best_.begin() + (k - 1), best_.end(), comes_first);
            std::sort(best_.begin(), best_.begin() + (k - 1), comes_first);
            return;
        }
        heap_.take(x, shift, n_, k);
        best_.resize(k);
        for (int64_t i = 0; i < k; ++i) best_[i] = {x[heap_.id(i)] - shift, heap_.id(i)};
    }

    void report_top(float normaliser, int64_t k, int64_t* ids, float* values) {
        select(logits_.data(), normaliser, k);
        for (int64_t i = 0; i < k; ++i) ids[i] = best_[i].id, values[i] = best_[i].value;
    }

    typedef double Doubles __attribute__((vector_size(kLanes / 2 * sizeof(double))));

    // -- draws ---------------------------------------------------------------------------------------

    int64_t draw(const Row& row, float highest, float log_sum, bool is_changed) {
        const float temperature = static_cast<float>(row.temperature);
        if (!(temperature > 0 && std::isfinite(temperature))) return -1;
        for (int64_t i = 0; i < n_; ++i) logits_[i] -= highest;
        if (temperature != 1.0f) {
            for (int64_t i = 0; i < n_; ++i) logits_[i] /= temperature;
        }
        pad(logits_.data(), n_);
        if (row.draw == kPlain) return draw_plain(row.uniform);
        if (row.top_k > 0) return draw_from_best(row);
        const float total =
            is_changed || temperature != 1.0f ? log_sum_exp(logits_.data(), n_, 0.0f) : log_sum;
        return draw_narrowed(row, total);
    }

    // From the whole vocabulary, in its order, with the probabilities of torch's softmax.
    int64_t draw_plain(double uniform) {
#if defined(__AVX512F__)
        if (softmax_exp_ == nullptr) return -1;
        float* weights = weights_.data();
        for (int64_t i = 0; i < n_; i += kLanes) store(weights + i, softmax_exp_(load(&logits_[i])));
        const float scale = 1.0f / sum_of_softmax(weights, n_);
        masses_.clear();
        double total = 0;
        for (int64_t begin = 0; begin < n_; begin += kBlock) {
            masses_.push_back(scaled_mass(weights + begin, std::min(kBlock, n_ - begin), scale));
            total += masses_.back();
        }
        const double sought = uniform * total, margin = kMargin * total;
        double before = 0;
        size_t block = 0;
        for (; block < masses_.size() && before + masses_[block] <= sought; ++block) before += masses_[block];
        const int64_t begin = static_cast<int64_t>(block) * kBlock;
        for (int64_t id = begin; id < std::min(begin + kBlock, n_); before += weights[id++]) {
            if (before + weights[id] <= sought) continue;
            // Near a border the order of torch's sums decides.
            const bool is_clear = sought - before > margin && before + weights[id] - sought > margin;
            return is_clear ? id : -1;
        }
#endif
        return -1;
    }

    // Scale n weights and add them up; zeros follow the row's last ones.
    static double scaled_mass(float* weights, int64_t n, float scale) {
        Doubles low{}, high{};
        for (int64_t i = 0; i < n; i += kLanes) {
            store(weights + i, load(weights + i) * scale);
            low += widened(weights + i), high += widened(weights + i + kLanes / 2);
        }
        const Doubles sums = low + high;
        double mass = 0;
        for (int lane = 0; lane < kLanes / 2; ++lane) mass += sums[lane];
        return mass;
    }

    // From at most `kCandidates` tokens, sorted: step by step what draws.py does.
    int64_t draw_from_best(const Row& row) {
        const int64_t count = std::min(kCandidates, n_), k = std::min(row.top_k, count);
        select(logits_.data(), 0.0f, k);
        float* values = values_.data();
        for (int64_t i = 0; i < k; ++i) values[i] = best_[i].value;
        exponentials(values, k, 0.0f, buffer_.data());
        std::fill(&buffer_[k], &buffer_[count], 0.0f);
        exponentials(values, k, log_of(sum_as_torch(buffer_.data(), count)), weights_.data());
        double cumulated = 0, kept = 0;
        int64_t num_kept = 0;
        for (; num_kept < k; ++num_kept) {
            const double weight = weights_[num_kept];
            cumulated += weight;
            const bool is_kept = cumulated - weight < row.top_p && weight >= row.min_p * weights_[0];
            if (num_kept > 0 && !is_kept) break;
            kept = cumulated;
        }
        const double sought = row.uniform * kept;
        int64_t place = 0, last = 0;
        double sum = weights_[0];
        for (; place + 1 < num_kept && sum <= sought; sum += weights_[++place]) {
        }
        for (int64_t i = 0; i < num_kept; ++i) last = weights_[i] > 0 ? i : last;
        place = std::min(place, last);
        const float value = values[place];
        if (first_of(value, 1) < 0) return first_of(value, 0);
        return selected(count, place);
    }

    // The id at a place of the k best scores, in the order of torch's topk.
    int64_t selected(int64_t k, int64_t place) {
        if (k * 64 > n_ && selection_.take(logits_.data(), 0.0f, n_, k)) {
            const int64_t id = place < k - 1 ? selection_.sorted(k - 1, place) : selection_.id(place);
            if (id >= 0) return id;
        }
        select(logits_.data(), 0.0f, k);
        return best_[place].id;
    }

    // From as many tokens as top-p and min-p leave, of the whole row.
    int64_t draw_narrowed(const Row& row, float total) {
        const int64_t count = take_candidates(row, total);
        choose_pivots(values_.data(), count, all_.bounds);
        weigh(values_.data(), weights_.data(), count, all_);
        const double mass = all_.masses[kPivots + 1];
        if (mass < row.top_p - kMargin) return draw_from_mass(row, total, count, mass);
        const Group last = find(count, row.top_p);
        if (last.size == 0) return -1;
        const double share = (row.top_p - last.before) / last.weight, nearest = std::round(share);
        const auto drawn_of_first = [&](double number) {
            const double kept = last.before + std::max(1.0, number) * last.weight;
            return draw_from_mass(row, total, count, kept);
        };
        if (is_clear(share, last.weight)) return drawn_of_first(std::ceil(share));
        const int64_t token = drawn_of_first(nearest);  // rounding decides whether one more stays
        return token == drawn_of_first(nearest + 1) ? token : -1;
    }

    // Whether `share` of a weight isn't so near to a whole number that rounding decides which side it is on.
    static bool is_clear(double share, double weight) {
        return weight < kMargin || std::abs(share - std::round(share)) * weight > kMargin;
    }

    int64_t draw_from_mass(const Row& row, float total, int64_t count, double kept) {
        const double sought = row.uniform * kept;
        const Group group = find(count, sought);
        if (group.size == 0) return -1;
        const double share = (sought - group.before) / group.weight;
        if (row.uniform > 0 && !is_clear(share, group.weight)) return -1;
        return in_order(row, total, group, static_cast<int64_t>(share));
    }

    // Take the tokens that may count: values, and their weights. Return how many there are.
    int64_t take_candidates(const Row& row, float total) {
        float least = kMinusInfinity;
        // What is left out weighs less than 1 - top_p, all together.
        if (row.top_p < 0.999) least = total + std::log((1 - row.top_p) / n_) - 0.01;
        if (row.min_p > 0) least = std::max(least, static_cast<float>(std::log(row.min_p) - 1e-3));
        int64_t count = 0;
        for (int64_t i = 0; i < n_; i += kLanes) {
            const Vector x = load(&logits_[i]);
            const uint32_t bits = greater(x, splat(least));
            compress(&values_[count], x, bits);
            count += __builtin_popcount(bits);
        }
        exponentials(values_.data(), count, total, weights_.data());
        if (row.min_p > 0) {
            float first = -total, weight;
            exp_(1, &first, &weight, kAccurate);
            const double smallest = row.min_p * static_cast<double>(weight);
            float bound = static_cast<float>(smallest);
            if (bound < smallest) bound = std::nextafter(bound, 1.0f);
            pad(weights_.data(), count);
            int64_t kept = 0;
            for (int64_t i = 0; i < count; i += kLanes) {
                const Vector x = load(&values_[i]), weighed = load(&weights_[i]);
                const uint32_t bits = ~greater(splat(bound), weighed) & 0xffff;
                compress(&values_[kept], x, bits);
                compress(&weights_[kept], weighed, bits);
                kept += __builtin_popcount(bits);
            }
            count = kept;
        }
        pad(values_.data(), count);
        std::fill(&weights_[count], &weights_[count] + kLanes, 0.0f);
        return count;
    }

    // The tokens at which the weights, added up from the largest value on, exceed `sought`.
    Group find(int64_t count, double sought) {
        const float *values = values_.data(), *weights = weights_.data();
        double before = 0;
        int64_t place = 0;
        Split split = all_;
        for (int turn = 0; count > kLeaf; turn ^= 1) {
            if (values != values_.data()) {
                choose_pivots(values, count, split.bounds);
                weigh(values, weights, count, split);
            }
            int part = 0;  // from bounds[part + 1], exclusive, to bounds[part], inclusive
            while (part < kPivots && before + split.masses[part + 1] <= sought) ++part;
            float *next_values = near_values_[turn].data(), *next_weights = near_weights_[turn].data();
            int64_t kept = 0, above = 0;
            for (int64_t i = 0; i < count; i += kLanes) {
                const Vector x = load(values + i);
                const uint32_t before_part = greater(x, splat(split.bounds[part]));
                const uint32_t bits = greater(x, splat(split.bounds[part + 1])) & ~before_part;
                compress(next_values + kept, x, bits);
                compress(next_weights + kept, load(weights + i), bits);
                kept += __builtin_popcount(bits), above += __builtin_popcount(before_part);
            }
            const bool is_done = kept == count;  // all of one value, perhaps
            before += split.masses[part], place += above, count = kept;
            pad(next_values, count);
            std::fill(next_weights + count, next_weights + count + kLanes, 0.0f);
            values = next_values, weights = next_weights;
            if (is_done) break;
        }
        return find_sorted(values, weights, count, before, place, sought);
    }

    static constexpr int kPivots = 7;

    struct Split {
        float bounds[kPivots + 2];    // infinity, falling values, minus infinity
        double masses[kPivots + 2];   // of what lies above each
    };

    // Values that split a sample evenly.
    static void choose_pivots(const float* values, int64_t count, float* bounds) {
        constexpr int kSample = 64;
        float sample[kSample];
        for (int i = 0; i < kSample; ++i) sample[i] = values[i * count / kSample];
        std::sort(sample, sample + kSample, [](float a, float b) { return a > b; });
        bounds[0] = -kMinusInfinity, bounds[kPivots + 1] = kMinusInfinity;
        for (int i = 1; i <= kPivots; ++i) bounds[i] = sample[i * kSample / (kPivots + 1)];
    }

    static void weigh(const float* values, const float* weights, int64_t count, Split& split) {
        Doubles sums[kPivots + 1][2] = {};
        for (int64_t i = 0; i < count; i += kLanes) {
            const Vector x = load(values + i);
            const Doubles low = widened(weights + i), high = widened(weights + i + kLanes / 2);
#pragma GCC unroll 7
            for (int p = 0; p < kPivots; ++p) {
                const uint32_t bits = greater(x, splat(split.bounds[p + 1]));
                add(sums[p][0], low, bits), add(sums[p][1], high, bits >> kLanes / 2);
            }
            sums[kPivots][0] += low, sums[kPivots][1] += high;
        }
        split.masses[0] = 0;
        for (int p = 0; p <= kPivots; ++p) {
            const Doubles sum = sums[p][0] + sums[p][1];
            split.masses[p + 1] = 0;
            for (int lane = 0; lane < kLanes / 2; ++lane) split.masses[p + 1] += sum[lane];
        }
    }

    static Doubles widened(const float* from) {
        typedef float Floats __attribute__((vector_size(kLanes / 2 * sizeof(float))));
        Floats value;
        std::memcpy(&value, from, sizeof value);
        return __builtin_convertvector(value, Doubles);
    }

    // Add the lanes with their bits set.
    static void add(Doubles& sum, Doubles value, uint32_t bits) {
#if defined(__AVX512F__)
        sum = (Doubles)_mm512_mask_add_pd(
            (__m512d)sum, static_cast<__mmask8>(bits), (__m512d)sum, (__m512d)value);
#else
        for (int lane = 0; lane < kLanes / 2; ++lane) sum[lane] += bits >> lane & 1 ? value[lane] : 0.0;
#endif
    }

    Group find_sorted(const float* values, const float* weights, int64_t count, double before, int64_t place,
                      double sought) {
        std::vector<int32_t>& order = order_;
        order.resize(count);
        for (int64_t i = 0; i < count; ++i) order[i] = static_cast<int32_t>(i);
        std::sort(order.begin(), order.end(), [values](int32_t a, int32_t b) { return values[a] > values[b]; });
        for (int64_t i = 0; i < count;) {
            const float value = values[order[i]];
            const double weight = weights[order[i]];
            int64_t size = 0;
            while (i < count && values[order[i]] == value) ++i, ++size;
            if (before + size * weight > sought) return {value, weight, before, place, size};
            before += size * weight, place += size;
        }
        return {};
    }

    // The id of one of a group's tokens: in the order of torch's topk where the candidates suffice, else by id.
    int64_t in_order(const Row& row, float total, const Group& group, int64_t number) {
        if (group.size == 1) return first_of(group.value, 0);
        const int64_t count = std::min(kCandidates, n_), place = group.place + number;
        const double most = group.before + (count - group.place) * group.weight;  // of the candidates' mass
        const bool cannot_suffice = most < row.top_p - 1e-4 && row.min_p == 0;
        if (count < n_ && (place >= count || cannot_suffice)) return first_of(group.value, number);
        select(logits_.data(), 0.0f, count);
        if (count < n_ && !suffices(row, total)) return first_of(group.value, number);
        return best_[place].id;
    }

    // As in filters.py.
    bool suffices(const Row& row, float total) {
        float* values = near_values_[0].data();
        for (int64_t i = 0; i < kCandidates; ++i) values[i] = best_[i].value;
        exponentials(values, kCandidates, total, buffer_.data());
        float span = values[kCandidates - 1] - values[0], least;
        exp_(1, &span, &least, kAccurate);
        return sum_as_torch(buffer_.data(), kCandidates) >= row.top_p || least < row.min_p;
    }

    VectorMath exp_, log_;
    SoftmaxExp softmax_exp_;
    int64_t n_;
    std::vector<float> logits_;  // as they are changed, then scores: logits less the highest, over temperature
    std::vector<float> buffer_, values_, weights_, near_values_[2], near_weights_[2];
    Split all_;  // of all candidates
    std::vector<Scored> best_;
    Selection selection_;
    Heap heap_;
    std::vector<int32_t> order_;
    std::vector<double> masses_;  // of the blocks of a plain draw
};

}  // namespace
