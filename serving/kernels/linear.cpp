// Linear layers of a served model, and the two element-wise steps around them. Activations are float32; weights are
// float32, bfloat16, int8 or int4. A weight is read once for all rows: smaller formats are widened a piece at a time
// into the first cache, or multiplied as they are where the processor has an instruction for it.

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

enum Format : long { F32 = 0, BF16 = 1, INT8 = 2, INT4 = 3 };

typedef uint32_t uvec_at __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int8_t byte_at __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef uint8_t ubyte_at __attribute__((vector_size(LANES), aligned(1), may_alias));

struct Weights {
    const void* data;     // panels in one of the formats
    const float* scales;  // panel × group × PANEL, for int8 and int4
    long format, outputs, inputs;
};

// One panel's piece of k in float32: the panel itself, or its values widened into `scratch`.
static inline const float* widen(const Weights& w, long panel, long k0, long depth, float* scratch) {
    const long at = (panel * w.inputs + k0) * PANEL;
    switch (w.format) {
        case F32: return (const float*)w.data + at;
        case BF16: {  // a 32-bit lane holds k and, above it, k + 1
            const uint16_t* from = (const uint16_t*)w.data + at;
            for (long k = 0; k < depth; k += 2)
                for (long c = 0; c < PANEL; c += LANES) {
                    uvec pair = *(const uvec_at*)(from + k * PANEL + 2 * c);
                    store(scratch + k * PANEL + c, (vec)(pair << 16));
                    store(scratch + (k + 1) * PANEL + c, (vec)(pair & 0xffff0000u));
                }
            return scratch;
        }
        case INT8: {
            const int8_t* from = (const int8_t*)w.data + at;
            const float* scale = w.scales + at / GROUP;
            for (long k = 0; k < depth; ++k)
                for (long c = 0; c < PANEL; c += LANES) {
                    vec value = __builtin_convertvector(*(const byte_at*)(from + k * PANEL + c), vec);
                    store(scratch + k * PANEL + c, value * load(scale + k / GROUP * PANEL + c));
                }
            return scratch;
        }
        default: {  // INT4: a byte holds k and, above it, k + 1, each plus 8
            const uint8_t* from = (const uint8_t*)w.data + at / 2;
            const float* scale = w.scales + at / GROUP;
            for (long k = 0; k < depth; k += 2)
                for (long c = 0; c < PANEL; c += LANES) {
                    uvec pair = __builtin_convertvector(*(const ubyte_at*)(from + k / 2 * PANEL + c), uvec);
                    vec low = __builtin_convertvector((ivec)(pair & 15u) - 8, vec);
                    vec high = __builtin_convertvector((ivec)(pair >> 4) - 8, vec);
                    vec by = load(scale + k / GROUP * PANEL + c);
                    store(scratch + k * PANEL + c, low * by);
                    store(scratch + (k + 1) * PANEL + c, high * by);
                }
            return scratch;
        }
    }
}

#if defined(__AVX512BF16__)
// The processor's own product of pairs of bfloat16: x is rounded to bfloat16, and the sums are float32.
template <int R>
static inline void multiply_pairs(const uint32_t* x, const uint32_t* w, long pairs, vec (&acc)[R][2]) {
    for (long k = 0; k < pairs; ++k) {
        __m512bh b[2];
        for (int v = 0; v < 2; ++v) b[v] = (__m512bh)_mm512_loadu_si512(w + k * PANEL + v * LANES);
        for (int r = 0; r < R; ++r) {
            const __m512bh a = (__m512bh)_mm512_set1_epi32((int)x[k * R + r]);
            for (int v = 0; v < 2; ++v) acc[r][v] = (vec)_mm512_dpbf16_ps((__m512)acc[r][v], a, b[v]);
        }
    }
}
constexpr bool PAIRS = true;
#else
constexpr bool PAIRS = false;
#endif

// x's rows in the order in which tiles read them: tile after tile, k after k, row after row (or pairs of bfloat16 so).
static void pack_rows(const float* x, long stride, const Tile& tile, long inputs, bool pairs, float* packed) {
    float* to = packed + tile.first * inputs;
    uint32_t* to_pairs = (uint32_t*)to;
    for (long r = 0; r < tile.rows; ++r) {
        const float* row = x + (tile.first + r) * stride;
        if (pairs)
            for (long k = 0; k < inputs; k += 2)
                to_pairs[k / 2 * tile.rows + r] = float_to_bf16(row[k]) | (uint32_t)float_to_bf16(row[k + 1]) << 16;
        else
            for (long k = 0; k < inputs; ++k) to[k * tile.rows + r] = row[k];
    }
}

struct Near {  // what a thread keeps in its caches
    alignas(64) float weights[PANEL * DEPTH];
    alignas(64) float sums[CHUNK_TILES * MAX_ROWS * PANEL];
};

// One panel's columns of y for the rows of some tiles. All of k is summed near before y, which is far, is written once.
static void panel_times_rows(
    const Weights& w, const float* packed, const Tile* begin, const Tile* end, long panel, bool pairs,
    float* y, long y_stride, Near& near) {
    for (long k0 = 0; k0 < w.inputs; k0 += DEPTH) {
        const long depth = std::min(DEPTH, w.inputs - k0);
        const float* wide = pairs ? nullptr : widen(w, panel, k0, depth, near.weights);
        for (const Tile* tile = begin; tile != end; ++tile) {
            const float* x = packed + tile->first * w.inputs;
            float* sums = near.sums + (tile->first - begin->first) * PANEL;
            with_rows(tile->rows, [&]<int R>() {
                vec acc[R][2] = {};
#if defined(__AVX512BF16__)
                if (pairs)
                    multiply_pairs<R>(
                        (const uint32_t*)x + k0 / 2 * R,
                        (const uint32_t*)w.data + (panel * w.inputs + k0) / 2 * PANEL, depth / 2, acc);
                else
#endif
                    multiply<R, 2>(x + k0 * R, wide, PANEL, depth, acc);
                for (int r = 0; r < R; ++r)
                    for (int v = 0; v < 2; ++v) {
                        float* to = sums + r * PANEL + v * LANES;
                        store(to, k0 ? load(to) + acc[r][v] : acc[r][v]);
                    }
            });
        }
    }
    const long columns = std::min(PANEL, w.outputs - panel * PANEL), rows = end[-1].first + end[-1].rows - begin->first;
    for (long r = 0; r < rows; ++r)
        std::copy_n(near.sums + r * PANEL, columns, y + (begin->first + r) * y_stride + panel * PANEL);
}

// Rows in parts that are worth handing to another thread.
template <class F>
static void each_row(long rows, long threads, F&& work) {
    constexpr long PART = 32;
    Pool::shared().run((rows + PART - 1) / PART, threads, [&](long part) {
        for (long r = part * PART; r < std::min(rows, (part + 1) * PART); ++r) work(r);
    });
}

extern "C" {

long panel_columns() { return PANEL; }
long group_inputs() { return GROUP; }

// y (rows × outputs) = x (rows × inputs) · Wᵀ. `packed` is room for rows × inputs.
void linear(
    const float* x, long x_stride, long rows, const void* data, const float* scales, long format,
    long outputs, long inputs, float* y, long y_stride, float* packed, long threads) {
    const Weights w{data, scales, format, outputs, inputs};
    const bool pairs = PAIRS && format == BF16;
    const std::vector<Tile> all_tiles = tiles(rows);
    const long panels = (outputs + PANEL - 1) / PANEL, tasks = (panels + TASK_PANELS - 1) / TASK_PANELS;
    const long near_tiles = CHUNK_BYTES / (4 * MAX_ROWS * inputs);
    const size_t chunk = std::clamp(near_tiles, 4L, CHUNK_TILES);
    Pool& pool = Pool::shared();
    pool.run(all_tiles.size(), threads, [&](long t) { pack_rows(x, x_stride, all_tiles[t], inputs, pairs, packed); });
    pool.run(tasks, threads, [&](long task) {
        static thread_local Near near;
        for (size_t begin = 0; begin < all_tiles.size(); begin += chunk)
            for (long p = task * TASK_PANELS; p < std::min(panels, (task + 1) * TASK_PANELS); ++p)
                panel_times_rows(
                    w, packed, &all_tiles[begin], all_tiles.data() + std::min(begin + chunk, all_tiles.size()),
                    p, pairs, y, y_stride, near);
    });
}

// y = x / √(mean x² + eps) · weight, row by row.
void rms_norm(const float* x, const float* weight, float eps, long rows, long size, float* y, long threads) {
    each_row(rows, threads, [&](long r) {
        const float* from = x + r * size;
        vec squares = {};
        for (long i = 0; i < size; i += LANES) squares += load(from + i) * load(from + i);
        const float by = 1.0f / std::sqrt(sum(squares) / size + eps);
        for (long i = 0; i < size; i += LANES) store(y + r * size + i, load(from + i) * by * load(weight + i));
    });
}

// y (rows × size) = silu(gate) · up, where a row of x is gate and then up.
void silu_multiply(const float* x, long rows, long size, float* y, long threads) {
    each_row(rows, threads, [&](long r) {
        const float *gate = x + 2 * r * size, *up = gate + size;
        for (long i = 0; i < size; i += LANES) {
            const vec g = load(gate + i);
            store(y + r * size + i, g / (1.0f + vexp(-g)) * load(up + i));
        }
    });
}
}
