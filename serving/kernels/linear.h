// Linear layers of a served model. Activations are float32; weights are float32, bfloat16, int8 or int4. A weight is read
// once for all rows: smaller formats are widened a piece at a time into the first cache, or in registers where few rows
// share the piece, or multiplied as they are where the processor has an instruction for it.

#pragma once

#include "pool.h"
#include "tile.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

constexpr long PANEL = 2 * LANES;   // columns that are computed together
constexpr long DEPTH = 256;         // of k at a time: a panel's piece is 16 KiB (32 with AVX-512), in the first cache
constexpr long CHUNK_BYTES = 384 << 10;  // of x at a time: in the second cache
constexpr long CHUNK_TILES = 32;    // and no more than this, since their sums shall stay near
constexpr long TASK_PANELS = 4;     // what a thread takes at a time
constexpr long GROUP = 32;          // values of k that share an int8's or int4's scale

constexpr long NARROW_ROWS = 4;     // so many rows at most: more of them, and widening once costs less

enum Format : long { F32 = 0, BF16 = 1, INT8 = 2, INT4 = 3 };

typedef uint32_t uvec_at __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int8_t byte_at __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef uint8_t ubyte_at __attribute__((vector_size(LANES), aligned(1), may_alias));

struct Weights {
    const void* data;     // panels in one of the formats
    const float* scales;  // panel × group × PANEL, for int8 and int4
    const float* bias;    // of whole panels; or null
    long format, outputs, inputs;

    // Of a panel from k on, for one k more.
    long bytes() const { return format == F32 ? 4 * PANEL : format == BF16 ? 2 * PANEL : format == INT8 ? PANEL : PANEL / 2; }
    const char* at(long panel, long k) const { return (const char*)data + (panel * inputs + k) * bytes(); }
};

// The low and the high halves of pairs of bfloat16, as float32: a 32-bit lane holds k and, above it, k + 1.
static inline vec low(uvec pair) { return (vec)(pair << 16); }
static inline vec high(uvec pair) { return (vec)(pair & 0xffff0000u); }

// One panel's piece of k in float32: the panel itself, or its values widened into `scratch`.
static inline const float* widen(const Weights& w, long panel, long k0, long depth, float* scratch) {
    const long group = (panel * w.inputs + k0) / GROUP;
    switch (w.format) {
        case F32: return (const float*)w.at(panel, k0);
        case BF16: {
            const uint16_t* from = (const uint16_t*)w.at(panel, k0);
            for (long k = 0; k < depth; k += 2)
                for (long c = 0; c < PANEL; c += LANES) {
                    const uvec pair = *(const uvec_at*)(from + k * PANEL + 2 * c);
                    store(scratch + k * PANEL + c, low(pair));
                    store(scratch + (k + 1) * PANEL + c, high(pair));
                }
            return scratch;
        }
        case INT8: {
            const int8_t* from = (const int8_t*)w.at(panel, k0);
            for (long k = 0; k < depth; ++k)
                for (long c = 0; c < PANEL; c += LANES) {
                    vec value = __builtin_convertvector(*(const byte_at*)(from + k * PANEL + c), vec);
                    store(scratch + k * PANEL + c, value * load(w.scales + (group + k / GROUP) * PANEL + c));
                }
            return scratch;
        }
        default: {  // INT4: a byte holds k and, above it, k + 1, each plus 8
            const uint8_t* from = (const uint8_t*)w.at(panel, k0);
            for (long k = 0; k < depth; k += 2)
                for (long c = 0; c < PANEL; c += LANES) {
                    uvec pair = __builtin_convertvector(*(const ubyte_at*)(from + k / 2 * PANEL + c), uvec);
                    vec first = __builtin_convertvector((ivec)(pair & 15u) - 8, vec);
                    vec second = __builtin_convertvector((ivec)(pair >> 4) - 8, vec);
                    vec by = load(w.scales + (group + k / GROUP) * PANEL + c);
                    store(scratch + k * PANEL + c, first * by);
                    store(scratch + (k + 1) * PANEL + c, second * by);
                }
            return scratch;
        }
    }
}

#if defined(__AVX512BF16__)
constexpr bool PAIRS = true;
// The processor's own product of pairs of bfloat16: x is rounded to bfloat16, and the sums are float32.
template <int R>
static inline void multiply_narrow(
    const float* const (&x)[R], const uint16_t* w, long depth, Ahead ahead, vec (&acc)[R][2]) {
    for (long k = 0; k < depth; k += 2) {
        ahead.fetch(k);
        __m512bh b[2];
        UNROLLED for (int v = 0; v < 2; ++v) b[v] = (__m512bh)_mm512_loadu_si512(w + k * PANEL + 2 * v * LANES);
        UNROLLED for (int r = 0; r < R; ++r) {
            int pair;
            memcpy(&pair, x[r] + k / 2, 4);
            UNROLLED for (int v = 0; v < 2; ++v)
                acc[r][v] = (vec)_mm512_dpbf16_ps((__m512)acc[r][v], (__m512bh)_mm512_set1_epi32(pair), b[v]);
        }
    }
}
#else
constexpr bool PAIRS = false;
// `multiply` for a piece of a panel of bfloat16, widened in registers: the same products in the same order.
template <int R>
static inline void multiply_narrow(
    const float* const (&x)[R], const uint16_t* w, long depth, Ahead ahead, vec (&acc)[R][2]) {
    for (long k = 0; R <= NARROW_ROWS && k < depth; k += 2) {
        ahead.fetch(k);
        uvec pair[2];
        UNROLLED for (int v = 0; v < 2; ++v) pair[v] = *(const uvec_at*)(w + k * PANEL + 2 * v * LANES);
        UNROLLED for (int r = 0; r < R; ++r)
            UNROLLED for (int v = 0; v < 2; ++v) acc[r][v] += x[r][k] * low(pair[v]);
        UNROLLED for (int r = 0; r < R; ++r)
            UNROLLED for (int v = 0; v < 2; ++v) acc[r][v] += x[r][k + 1] * high(pair[v]);
    }
}
#endif

// Rows of activations. With PAIRS and bfloat16 weights a row holds pairs of bfloat16, of k and above it k + 1.
struct Rows { const float* at; long stride; };

struct Near {  // what a thread keeps in its caches
    alignas(64) float weights[PANEL * DEPTH];
    alignas(64) float sums[CHUNK_TILES * MAX_ROWS * PANEL];
};

struct Product {
    const Weights& w;
    Rows x;
    float* y;
    long y_stride;
    bool add;  // to what y holds

    // One panel's columns of y for the rows of some tiles. All of k is summed near before y, which is far, is written.
    void panel(long panel, const Tile* begin, const Tile* end, Near& near) const {
        const bool narrow = w.format == BF16 && (PAIRS || (end - begin == 1 && begin->rows <= NARROW_ROWS));
        const long x_values = PAIRS && w.format == BF16 ? 2 : 1;  // in a float's place
        for (long k0 = 0; k0 < w.inputs; k0 += DEPTH) {
            const long depth = std::min(DEPTH, w.inputs - k0);
            const float* wide = narrow ? nullptr : widen(w, panel, k0, depth, near.weights);
            Ahead ahead{w.at(panel, k0 + depth), w.bytes() / (end - begin)};  // each tile a part of the next piece
            for (const Tile* tile = begin; tile != end; ++tile, ahead.at += depth * ahead.by) {
                float* sums = near.sums + (tile->first - begin->first) * PANEL;
                with_rows(tile->rows, [&](auto height) {
                    constexpr int R = height;
                    vec acc[R][2] = {};
                    const float* from[R];
                    UNROLLED for (int r = 0; r < R; ++r) from[r] = x.at + (tile->first + r) * x.stride + k0 / x_values;
                    if (wide) multiply<R, 2>(from, wide, PANEL, depth, ahead, acc);
                    else multiply_narrow<R>(from, (const uint16_t*)w.at(panel, k0), depth, ahead, acc);
                    UNROLLED for (int r = 0; r < R; ++r)
                        UNROLLED for (int v = 0; v < 2; ++v) {
                            float* to = sums + r * PANEL + v * LANES;
                            store(to, k0 ? load(to) + acc[r][v] : acc[r][v]);
                        }
                });
            }
        }
        write(panel, begin->first, end[-1].first + end[-1].rows, near.sums);
    }

    void write(long panel, long first, long last, const float* sums) const {
        const long column = panel * PANEL;
        for (long r = first; r < last; ++r, sums += PANEL)
            for (long v = 0; v < PANEL; v += LANES) {
                const vec value = w.bias ? load(sums + v) + load(w.bias + column + v) : load(sums + v);
                float* to = y + r * y_stride + column + v;
                const long columns = w.outputs - column - v;
                if (columns >= LANES) store(to, add ? load(to) + value : value);
                else for (long c = 0; c < columns; ++c) to[c] = add ? to[c] + value[c] : value[c];
            }
    }
};

static Rows round_to_pairs(Rows x, long rows, long inputs, long threads) {
    static std::vector<float> room;
    room.resize(std::max<size_t>(room.size(), rows * inputs / 2));
    Pool::shared().run(rows, threads, [&](long r) {
        const float* from = x.at + r * x.stride;
        for (long k = 0; k < inputs; k += 2) {
            const uint32_t pair = float_to_bf16(from[k]) | (uint32_t)float_to_bf16(from[k + 1]) << 16;
            memcpy(&room[(r * inputs + k) / 2], &pair, 4);
        }
    });
    return {room.data(), inputs / 2};
}

// y (rows × outputs) = x (rows × inputs) · Wᵀ + bias, or that added to y.
static void linear(const Weights& w, Rows x, long rows, float* y, long y_stride, bool add, long threads) {
    if (PAIRS && w.format == BF16) x = round_to_pairs(x, rows, w.inputs, threads);
    const Product product{w, x, y, y_stride, add};
    const std::vector<Tile> all = tiles(rows);
    const long panels = (w.outputs + PANEL - 1) / PANEL, tasks = (panels + TASK_PANELS - 1) / TASK_PANELS;
    const size_t chunk = std::clamp(CHUNK_BYTES / (4 * MAX_ROWS * w.inputs), 4L, CHUNK_TILES);
    Pool::shared().run(tasks, threads, [&](long task) {
        static thread_local Near near;
        for (size_t begin = 0; begin < all.size(); begin += chunk)
            for (long p = task * TASK_PANELS; p < std::min(panels, (task + 1) * TASK_PANELS); ++p)
                product.panel(p, &all[begin], all.data() + std::min(begin + chunk, all.size()), near);
    });
}
