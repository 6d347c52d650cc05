// Activations of MLPs, a vector at a time.

#pragma once

#include "vectors.h"

namespace {

enum class Activation : int { kNone, kSilu, kRelu, kGelu, kGeluTanh };  // numbered as in products.py

// 1 / (1 + e^-x); NaN stays NaN.
inline Vector sigmoid(Vector x) {
    const Vector small = exponential(x < 0.0f ? x : -x);
    return (x < 0.0f ? small : splat(1.0f)) / (small + 1.0f);
}

// The error function within 1.5e-7, finer than bf16 by far (Abramowitz and Stegun 7.1.26).
inline Vector error_function(Vector x) {
    const Vector size = x < 0.0f ? -x : x;
    const Vector t = 1.0f / (size * 0.3275911f + 1.0f);
    Vector sum = splat(1.061405429f);
    sum = sum * t - 1.453152027f;
    sum = sum * t + 1.421413741f;
    sum = sum * t - 0.284496736f;
    sum = sum * t + 0.254829592f;
    const Vector found = 1.0f - sum * t * exponential(-size * size);
    return x < 0.0f ? -found : found;
}

inline Vector activated(Vector x, Activation activation) {
    switch (activation) {
        case Activation::kNone: return x;
        case Activation::kSilu: return x * sigmoid(x);
        case Activation::kRelu: return x < 0.0f ? Vector{} : x;
        case Activation::kGelu: return x * 0.5f * (error_function(x * 0.707106781f) + 1.0f);
        // tanh(y) = 2 sigmoid(2y) - 1, so that half of 1 + tanh is a sigmoid.
        case Activation::kGeluTanh: return x * sigmoid(1.595769122f * (x + 0.044715f * x * x * x));
    }
    return x;
}

}  // namespace
