// The k best of many scores, and tokens of equal scores in the order in which torch's topk leaves them.
//
// That order is an accident of libstdc++'s std::nth_element and std::sort, or std::partial_sort where k is small. So
// their steps are followed one by one, but with fewer branches on scores.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "vectors.h"

namespace {

// Bit i: whether a[i] > b[i].
inline uint32_t greater(Vector a, Vector b) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
#else
    uint32_t bits = 0;
    for (int lane = 0; lane < kLanes; ++lane) bits |= static_cast<uint32_t>(a[lane] > b[lane]) << lane;
    return bits;
#endif
}

// Where k is large: 16 scores are compared at once.
class Selection {
  public:
    // Take x - shift, n of them, and move the k best to the front as std::nth_element does. False: its steps would
    // become too many, so that it goes on in another way, which isn't followed here.
    bool take(const float* x, float shift, int64_t n, int64_t k) {
        if (static_cast<int64_t>(ids_.size()) < n) ids_.resize(n), room_.resize(n + 2 * kLanes);
        values_ = room_.data() + kLanes;
        std::fill(room_.data(), values_, -kMinusInfinity);  // so that scans end
        for (int64_t i = 0; i < n; ++i) values_[i] = x[i] - shift;
        for (int64_t i = 0; i < n; ++i) ids_[i] = static_cast<int32_t>(i);
        std::fill(values_ + n, values_ + n + kLanes, kMinusInfinity);
        return narrow(0, n, k - 1, 3);
    }

    // The id at `place` after std::sort of the first n; -1: as above.
    int64_t sorted(int64_t n, int64_t place) { return narrow(0, n, place, 16) ? ids_[place] : -1; }

    float value(int64_t place) const { return values_[place]; }
    int32_t id(int64_t place) const { return ids_[place]; }

  private:
    // Partition until a range of at most `few` has the place, and sort that; equal ones keep their order.
    bool narrow(int64_t first, int64_t last, int64_t place, int64_t few) {
        int turns = 0;
        for (int64_t left = last - first; left > 1; left /= 2) turns += 2;
        for (; last - first > few; --turns) {
            if (turns == 0) return false;
            move_median_to(first, first + 1, first + (last - first) / 2, last - 1);
            const int64_t cut = partition(first + 1, last, values_[first]);
            (cut <= place ? first : last) = cut;
        }
        for (int64_t i = first + 1; i < last; ++i) {
            for (int64_t j = i; j > first && values_[j] > values_[j - 1]; --j) swap(j, j - 1);
        }
        return true;
    }

    void swap(int64_t a, int64_t b) { std::swap(values_[a], values_[b]), std::swap(ids_[a], ids_[b]); }

    void move_median_to(int64_t to, int64_t a, int64_t b, int64_t c) {
        const float x = values_[a], y = values_[b], z = values_[c];
        if (x > y) {
            swap(to, y > z ? b : x > z ? c : a);
        } else {
            swap(to, x > z ? a : y > z ? c : b);
        }
    }

    // Swap, from both ends, what is at most the pivot with what is at least the pivot, until the ends meet.
    int64_t partition(int64_t first, int64_t last, float pivot) {
        const Vector pivots = splat(pivot);
        int64_t from_left = first - kLanes, from_right = last, met = last;
        uint32_t left = 0, right = 0;
        for (;;) {
            while (left == 0) left = ~greater(load(values_ + (from_left += kLanes)), pivots) & 0xffff;
            while (right == 0) right = ~greater(pivots, load(values_ + (from_right -= kLanes))) & 0xffff;
            const int64_t a = from_left + __builtin_ctz(left), b = from_right + 31 - __builtin_clz(right);
            if (a >= b) return std::min(a, met);
            swap(a, b);
            met = b, left &= left - 1, right &= ~(1u << (31 - __builtin_clz(right)));
        }
    }

    std::vector<float> room_;
    float* values_ = nullptr;  // between a vector of infinities and one of their opposites
    std::vector<int32_t> ids_;
};

// Where k is small: std::partial_sort's heap, the least score on top.
class Heap {
  public:
    // Sort the k best of x - shift, n of them.
    void take(const float* x, float shift, int64_t n, int64_t k) {
        heap_.resize(k);
        for (int64_t i = 0; i < k; ++i) heap_[i] = keyed(x[i] - shift, i);
        for (int64_t i = (k - 2) / 2; i >= 0; --i) sift(i, k, heap_[i]);
        for (int64_t i = k; i < n; ++i) {
            if (i % kLanes == 0) {
                while (i + kLanes <= n && !greater(load(x + i) - shift, splat(score(heap_[0])))) i += kLanes;
                if (i >= n) break;
            }
            const Keyed next = keyed(x[i] - shift, i);
            if (next.key > heap_[0].key) sift(0, k, next);
        }
        for (int64_t last = k - 1; last > 0; --last) {
            const Keyed worst = heap_[last];
            heap_[last] = heap_[0];
            sift(0, last, worst);
        }
    }

    int32_t id(int64_t place) const { return heap_[place].id; }

  private:
    struct Keyed {
        int32_t key, id;  // keys are whole numbers in the order of the scores
    };

    static Keyed keyed(float score, int64_t id) {
        score += 0.0f;  // -0 becomes 0
        int32_t bits;
        std::memcpy(&bits, &score, sizeof bits);
        return {bits ^ (bits >> 31 & 0x7fffffff), static_cast<int32_t>(id)};
    }

    static float score(Keyed from) {
        const int32_t bits = from.key ^ (from.key >> 31 & 0x7fffffff);
        float score;
        std::memcpy(&score, &bits, sizeof score);
        return score;
    }

    // Put `moved` at `hole` or below, where no child is less, in a heap of n; of equal children the second moves up.
    void sift(int64_t hole, int64_t n, Keyed moved) {
        Keyed* heap = heap_.data();
        int64_t child = 2 * hole + 2;
        for (; child < n; child = 2 * hole + 2) {
            child -= heap[child].key > heap[child - 1].key;
            if (heap[child].key > moved.key) break;
            heap[hole] = heap[child], hole = child;
        }
        if (child == n && heap[child - 1].key <= moved.key) heap[hole] = heap[child - 1], hole = child - 1;
        heap[hole] = moved;
    }

    std::vector<Keyed> heap_;
};

}  // namespace
