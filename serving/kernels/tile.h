// What the kernels share: vectors as long as the machine's, and the one register tile that does all the arithmetic.
//
// The tile is R rows by V vectors of accumulators, fed one value of k at a time. What it multiplies with waits in memory
// in the order in which it is read ("panels" of a few vectors' columns, k after k), so memory is read in sequence.
// (The scheme of BLIS: Van Zee and van de Geijn, "BLIS: A Framework for Rapidly Instantiating BLAS", TOMS 2015.)
//
// Compiled for the machine it runs on (see build.py), so the vector's length is known here.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__)
constexpr int LANES = 16, MAX_ROWS = 12;  // 24 accumulators of 32 registers
#else
constexpr int LANES = 8, MAX_ROWS = 6;  // 12 of 16
#endif

// Accumulators are registers only where the loops over them are gone, which -O2 does not see to by itself.
#define UNROLLED _Pragma("GCC unroll 16")

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef float vec_at __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
typedef uint32_t uvec __attribute__((vector_size(LANES * 4)));

static inline vec load(const float* p) { return *(const vec_at*)p; }
static inline void store(float* p, vec v) { *(vec_at*)p = v; }
static inline vec all(float value) { return vec{} + value; }

static inline uint16_t float_to_bf16(float value) {  // to nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// e^x in float32, within 2 units in the last place for x in [-87, 88]: 2^n times a polynomial of the rest.
// (Coefficients: Cephes, expf.)
static inline vec vexp(vec x) {
    x = x < -87.0f ? all(-87.0f) : x;
    x = x > 88.0f ? all(88.0f) : x;
    const float round = 12582912.0f;  // 1.5 · 2^23: adding it leaves the nearest whole number in the low bits
    vec n = x * 1.44269504088896341f + round;
    ivec exponent = ((ivec)n - (ivec)all(round) + 127) << 23;
    n -= round;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return (p * r * r + r + 1.0f) * (vec)exponent;
}

static inline float sum(vec v) {
    float total = 0;
    for (int i = 0; i < LANES; ++i) total += v[i];
    return total;
}

// Memory that is asked for while something else is computed, `by` bytes at each k: it comes as fast as it is used up, and
// the processor's own guesses stop where a piece is used more than once.
struct Ahead {
    const char* at;
    long by;

    void fetch(long k) const { __builtin_prefetch(at + k * by, 0, 2); }
};

// acc[r][v] += Σ_k x[r][k] · w[k·stride + v·LANES]. Sums run in the order of k whatever R is: a row's result is the
// same, to the bit, whichever rows it shares a tile with.
template <int R, int V>
static inline void multiply(
    const float* const (&x)[R], const float* w, long stride, long depth, Ahead ahead, vec (&acc)[R][V]) {
    for (long k = 0; k < depth; ++k) {
        ahead.fetch(k);
        vec b[V];
        UNROLLED for (int v = 0; v < V; ++v) b[v] = load(w + k * stride + v * LANES);
        UNROLLED for (int r = 0; r < R; ++r)
            UNROLLED for (int v = 0; v < V; ++v) acc[r][v] += x[r][k] * b[v];
    }
}

// Calls f with the number of rows, known only now, as a constant.
template <int R = MAX_ROWS, class F>
static inline void with_rows(long rows, F&& f) {
    if constexpr (R > 1)
        if (rows < R) return with_rows<R - 1>(rows, f);
    f(std::integral_constant<int, R>{});
}

// A batch's rows, cut into tiles of nearly equal height.
struct Tile { long first, rows; };

static std::vector<Tile> tiles(long rows) {
    const long count = (rows + MAX_ROWS - 1) / MAX_ROWS;
    std::vector<Tile> result;
    for (long i = 0, first = 0; i < count; ++i) {
        const long height = rows / count + (i < rows % count);
        result.push_back({first, height});
        first += height;
    }
    return result;
}
