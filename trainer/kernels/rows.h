// What a decoder does to each of its rows between products: norms, rotary positions, the gate, the loss. Widths are
// multiples of 16 but where a part of a vector is said to be possible.

#pragma once

#include "products.h"

#include <cmath>
#include <cstdint>

typedef int32_t bits __attribute__((vector_size(LANES * 4)));

static inline float sum(vec value) {
    float total = 0.0f;
    for (int i = 0; i < LANES; ++i) total += value[i];
    return total;
}

static inline float largest(vec value) {
    float most = value[0];
    for (int i = 1; i < LANES; ++i) most = std::max(most, value[i]);
    return most;
}

// e^x to two units in the last place for x from -87 to 88, beyond which it stays: 2^n by its bits, times a polynomial of
// the rest (coefficients: Cephes, expf).
static inline vec exponential(vec x) {
    x = x < -87.0f ? vec{} - 87.0f : x > 88.0f ? vec{} + 88.0f : x;
    const vec shift = vec{} + 12582912.0f;  // 1.5 · 2^23: what is added to it is rounded to a whole number
    const vec rounded = x * 1.44269504f + shift;
    const vec n = rounded - shift;
    const vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vec p = r * 1.9875691e-4f + 1.3981999e-3f;
    p = p * r + 8.3334519e-3f;
    p = p * r + 4.1665795e-2f;
    p = p * r + 1.6666666e-1f;
    p = p * r + 5.0000001e-1f;
    p = p * r * r + r + 1.0f;
    return (vec)((bits)p + (((bits)rounded - (bits)shift) << 23));
}

// RMSNorm (Zhang and Sennrich 2019): y = gain · x·scale, with scale = 1/√(mean x² + eps).
static void norm(const float* x, const float* gain, long rows, long width, float eps, float* scale, float* y) {
    for (long i = 0; i < rows; ++i, x += width, y += width) {
        vec squares = {};
        for (long j = 0; j < width; j += LANES) squares += load(x + j) * load(x + j);
        scale[i] = 1.0f / std::sqrt(sum(squares) / width + eps);
        for (long j = 0; j < width; j += LANES) store(y + j, load(gain + j) * (load(x + j) * scale[i]));
    }
}

// The same again from the scale that was kept.
static void norm_again(const float* x, const float* gain, long rows, long width, const float* scale, float* y) {
    for (long i = 0; i < rows; ++i, x += width, y += width)
        for (long j = 0; j < width; j += LANES) store(y + j, load(gain + j) * (load(x + j) * scale[i]));
}

// With g = gradient of y: to = besides + scale·(g·gain - x·scale²·mean(g·gain·x)), and gain_gradient = Σ g·x·scale.
// `besides` is the gradient that x has from elsewhere; `to` may be either.
static void norm_back(const float* gradient, const float* x, const float* gain, const float* scale, const float* besides,
                      long rows, long width, float* to, float* gain_gradient) {
    std::fill(gain_gradient, gain_gradient + width, 0.0f);
    for (long i = 0; i < rows; ++i, gradient += width, x += width, besides += width, to += width) {
        vec along = {};
        for (long j = 0; j < width; j += LANES) along += load(gradient + j) * load(gain + j) * load(x + j);
        const float take = scale[i] * scale[i] * sum(along) / width;
        for (long j = 0; j < width; j += LANES) {
            const vec g = load(gradient + j), value = load(x + j);
            store(gain_gradient + j, load(gain_gradient + j) + g * value * scale[i]);
            store(to + j, load(besides + j) + (g * load(gain + j) - value * take) * scale[i]);
        }
    }
}

// Rotary positions (Su et al. 2021) of one head: pairs are (j, j + half). `sign` -1 turns back. Any width.
static inline void turn(float* head, const float* cos, const float* sin, float sign, long half) {
#pragma omp simd
    for (long j = 0; j < half; ++j) {
        const float a = head[j], b = head[j + half], s = sign * sin[j];
        head[j] = a * cos[j] - b * s;
        head[j + half] = b * cos[j] + a * s;
    }
}

// SwiGLU (Shazeer 2020): to = silu(gate)·up. Rows of `both` are gate and up, side by side.
static void gate(const float* both, long rows, long width, float* to) {
    for (long i = 0; i < rows; ++i, both += 2 * width, to += width)
        for (long j = 0; j < width; j += LANES) {
            const vec g = load(both + j);
            store(to + j, g / (1.0f + exponential(-g)) * load(both + width + j));
        }
}

// The gradients of gate and up from that of their product, and the product again.
static void gate_back(const float* gradient, const float* both, long rows, long width, float* both_gradient, float* product) {
    for (long i = 0; i < rows; ++i, gradient += width, both += 2 * width, both_gradient += 2 * width, product += width)
        for (long j = 0; j < width; j += LANES) {
            const vec g = load(both + j), up = load(both + width + j), from = load(gradient + j);
            const vec open = 1.0f / (1.0f + exponential(-g)), silu = g * open;
            store(product + j, silu * up);
            store(both_gradient + j, from * up * (open + silu * (1.0f - open)));
            store(both_gradient + width + j, from * silu);
        }
}

// Cross-entropy of a row of logits, in nats, and in the logits' place its gradient, p - 1 at the target. A target below 0
// does not count. `logits` has room up to `padded`, a multiple of WIDTH.
static double loss_of_row(float* logits, long columns, long padded, int64_t target) {
    if (target < 0) {
        memset(logits, 0, padded * sizeof(float));
        return 0.0;
    }
    for (long j = columns; j < padded; ++j) logits[j] = -INFINITY;
    vec most = load(logits);
    for (long j = LANES; j < padded; j += LANES) most = load(logits + j) > most ? load(logits + j) : most;
    const float highest = largest(most), wanted = logits[target];
    vec total = {};
    for (long j = 0; j < padded; j += LANES) {
        const vec p = exponential(load(logits + j) - highest);
        store(logits + j, p);
        total += p;
    }
    const float all = sum(total);
    for (long j = 0; j < padded; j += LANES) store(logits + j, load(logits + j) / all);
    logits[target] -= 1.0f;
    return std::log((double)all) + highest - wanted;
}
