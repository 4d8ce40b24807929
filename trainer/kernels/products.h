// Matrix products: rows times a matrix that waits in memory in the order in which it is read.
//
// All arithmetic is done by one tile of TILE_ROWS rows and two vectors of columns, whose sums stay in registers while k
// goes by. What it multiplies with lies in panels of two vectors' columns, DEPTH of k at a time, so that a panel stays in
// the first cache while the rows pass. (The scheme of BLIS: Van Zee and van de Geijn, TOMS 2015.) The sum behind every
// element runs in the order of k however the rows are dealt to threads: their number changes no bit.

#pragma once

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <utility>

#if defined(__AVX512F__)
constexpr int LANES = 16, TILE_ROWS = 12;  // 24 sums of 32 registers
#else
constexpr int LANES = 8, TILE_ROWS = 6;  // 12 of 16
#endif
constexpr long WIDTH = 2 * LANES, DEPTH = 256;
constexpr long BLOCK = 96;  // most rows that go through everything together, in the second cache; any tile's height divides it
// From here on a matrix is more than the second cache holds. With it, rows in order and panels asked for ahead, a block 768 wide
// with 2,048 between takes 0.86 to 0.89 of the time without (88 GFLOP/s of a core's 100 in a product alone, where MKL's are 90).
constexpr long WIDE = 512;

// How many rows those are: few where matrices are small, so that threads have the same share; more where each block reads
// matrices from beyond the second cache.
static long rows_together(long width) { return width < WIDE ? BLOCK / 2 : BLOCK; }

// Sums are registers only where the loops over them are gone.
#define UNROLLED _Pragma("GCC unroll 16")

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef float vec_at __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

static inline vec load(const float* at) { return *(const vec_at*)at; }
static inline void store(float* at, vec value) { *(vec_at*)at = value; }

// Memory that stays for the next call: what is fresh costs a page fault for every 4 KiB.
class Room {
  public:
    float* of(long floats) {
        if (floats > floats_) {
            free(at_);
            at_ = (float*)aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64);
            floats_ = floats;
        }
        return at_;
    }
    ~Room() { free(at_); }

  private:
    float* at_ = nullptr;
    long floats_ = 0;
};

// Element (i, j) of a matrix is at[i·row + j·column].
struct Matrix {
    const float* at;
    long row, column;
};

// A matrix of `depth` rows in panels: DEPTH of its rows at a time, WIDTH of its columns, row after row; zeros fill the last.
struct Panels {
    float* at;
    long depth, columns;

    static long padded(long columns) { return (columns + WIDTH - 1) / WIDTH * WIDTH; }
    static long floats(long depth, long columns) { return depth * padded(columns); }

    const float* panel(long k, long height, long column) const { return at + k * padded(columns) + column * height; }
};

// Of two rows the right parts of S numbers of the first and the left ones of the second change places.
template <int S, int... I>
static inline void swap_parts(vec& a, vec& b, std::integer_sequence<int, I...>) {
    const vec first = __builtin_shufflevector(a, b, (I & S ? LANES + I - S : I)...);
    b = __builtin_shufflevector(a, b, (I & S ? LANES + I : I + S)...);
    a = first;
}

// LANES rows become columns: halves of them, then halves of those, change places across the diagonal.
template <int S = LANES / 2>
static inline void transpose(vec (&rows)[LANES]) {
    UNROLLED for (int i = 0; i < LANES; ++i) {
        if (!(i & S)) swap_parts<S>(rows[i], rows[i + S], std::make_integer_sequence<int, LANES>());
    }
    if constexpr (S > 1) transpose<S / 2>(rows);
}

// WIDTH columns, on this thread.
static void pack_panels(Matrix from, long depth, long columns, long column, float* to) {
    const long width = std::min(WIDTH, columns - column);
    for (long k = 0; k < depth; k += DEPTH) {
        const long height = std::min(DEPTH, depth - k), whole = from.row == 1 && width == WIDTH ? height / LANES * LANES : 0;
        float* panel = to + k * Panels::padded(columns) + column * height;
        const float* first = from.at + k * from.row + column * from.column;
        if (width < WIDTH) memset(panel, 0, height * WIDTH * sizeof(float));
        if (from.column == 1 && width == WIDTH) {
            for (long i = 0; i < height; ++i)
                UNROLLED for (int v = 0; v < WIDTH; v += LANES) store(panel + i * WIDTH + v, load(first + i * from.row + v));
            continue;
        }
        for (long i = 0; i < whole; i += LANES)
            for (int v = 0; v < WIDTH; v += LANES) {
                vec rows[LANES];
                UNROLLED for (int j = 0; j < LANES; ++j) rows[j] = load(first + i + (v + j) * from.column);
                transpose(rows);
                UNROLLED for (int j = 0; j < LANES; ++j) store(panel + (i + j) * WIDTH + v, rows[j]);
            }
        for (long j = 0; j < width; ++j)
            for (long i = whole; i < height; ++i) panel[i * WIDTH + j] = first[i * from.row + j * from.column];
    }
}

static Panels pack_here(Matrix from, long depth, long columns, float* to) {
    for (long column = 0; column < columns; column += WIDTH) pack_panels(from, depth, columns, column, to);
    return {to, depth, columns};
}

struct Packing {
    Matrix from;
    Panels to;
};

// Several on all threads, panel by panel in turn: each alone would take no longer than to wake them.
template <size_t N>
static void pack(const Packing (&all)[N]) {
    const auto panels_of = [](const Packing& each) { return Panels::padded(each.to.columns) / WIDTH; };
    long panels = 0;
    for (const Packing& each : all) panels += panels_of(each);
#pragma omp parallel for schedule(static, 1)
    for (long number = 0; number < panels; ++number) {
        const Packing* each = all;
        long panel = number;
        while (panel >= panels_of(*each)) panel -= panels_of(*each++);
        pack_panels(each->from, each->to.depth, each->to.columns, panel * WIDTH, each->to.at);
    }
}

// Where sums begin (null: at zero) and where they go; both with the same columns side by side.
struct Sums {
    const float* from;
    long from_row;
    float* to;
    long to_row;
};

static inline vec load_some(const float* at, long count) {
    vec value = {};
    for (long i = 0; i < std::min<long>(count, LANES); ++i) value[i] = at[i];
    return value;
}

static inline void store_some(float* at, vec value, long count) {
    for (long i = 0; i < std::min<long>(count, LANES); ++i) at[i] = value[i];
}

// R rows, which lie `row` apart or, ORDERED, k after k of TILE_ROWS, times a panel. Inlined where it is called most.
template <int R, bool ORDERED>
[[gnu::always_inline]] static inline void multiply_panel(const float* a, long row, const float* panel, long height, Sums sums,
                                                         long width) {
    vec sum[R][2] = {};
    const bool whole = width == WIDTH;
    UNROLLED for (int r = 0; r < R; ++r)  // what is needed last is on its way while k goes by
        for (long line = 0; line < WIDTH; line += 16) __builtin_prefetch(sums.to + r * sums.to_row + line, 1);
    _Pragma("GCC unroll 4") for (long k = 0; k < height; ++k) {
        const vec left = load(panel + k * WIDTH), right = load(panel + k * WIDTH + LANES);
        UNROLLED for (int r = 0; r < R; ++r) {
            const float x = ORDERED ? a[k * TILE_ROWS + r] : a[r * row + k];
            sum[r][0] += x * left;
            sum[r][1] += x * right;
        }
    }
    UNROLLED for (int r = 0; r < R; ++r) {
        float* to = sums.to + r * sums.to_row;
        const float* from = sums.from ? sums.from + r * sums.from_row : nullptr;
        if (from) {
            sum[r][0] += whole ? load(from) : load_some(from, width);
            sum[r][1] += whole ? load(from + LANES) : load_some(from + LANES, width - LANES);
        }
        if (whole) {
            store(to, sum[r][0]);
            store(to + LANES, sum[r][1]);
        } else {
            store_some(to, sum[r][0], width);
            store_some(to + LANES, sum[r][1], width - LANES);
        }
    }
}

template <int R, bool ORDERED>
static void tile(const float* a, long row, const float* panel, long height, Sums sums, long width) {
    multiply_panel<R, ORDERED>(a, row, panel, height, sums, width);
}

typedef void (*Tile)(const float*, long, const float*, long, Sums, long);

template <bool ORDERED, int... R>
constexpr std::array<Tile, sizeof...(R)> tiles_of(std::integer_sequence<int, R...>) {
    return {tile<R + 1, ORDERED>...};
}
// Of fewer rows than TILE_ROWS.
constexpr std::array<Tile, TILE_ROWS - 1> REST[2] = {tiles_of<false>(std::make_integer_sequence<int, TILE_ROWS - 1>()),
                                                     tiles_of<true>(std::make_integer_sequence<int, TILE_ROWS - 1>())};

// What a tile's rows of `height` take, with room for the vector that reaches beyond their end.
static long ordered_floats(long height) { return TILE_ROWS * height + LANES; }

// Rows as tiles read them: k after k of TILE_ROWS rows. Few k at a time, so that rows which lie a power of two apart do not
// drive one another out of the cache. Of vectors, each reaches into what the next one writes.
static void order_rows(Matrix a, long rows, long height, float* to) {
    for (long k = 0; k < height; k += LANES)
        for (long i = 0; i < rows; i += TILE_ROWS) {
            const long together = std::min<long>(TILE_ROWS, rows - i), deep = std::min<long>(LANES, height - k);
            const float* from = a.at + i * a.row + k * a.column;
            float* at = to + i / TILE_ROWS * ordered_floats(height) + k * TILE_ROWS;
            if (a.row == 1 && i + LANES <= rows) {
                for (long j = 0; j < deep; ++j) store(at + j * TILE_ROWS, load(from + j * a.column));
            } else if (a.column == 1 && deep == LANES) {
                vec some[LANES] = {};
                for (long r = 0; r < together; ++r) some[r] = load(from + r * a.row);
                transpose(some);
                UNROLLED for (int j = 0; j < LANES; ++j) store(at + j * TILE_ROWS, some[j]);
            } else {
                for (long j = 0; j < deep; ++j)
                    for (long r = 0; r < together; ++r) at[j * TILE_ROWS + r] = from[r * a.row + j * a.column];
            }
        }
}

// Up to BLOCK rows of a, times b, or times its first `depth` rows; on this thread. Rows are put in order first where they
// are read down their columns, or by enough columns of b to be worth it.
static void multiply(Matrix a, long rows, const Panels& b, Sums sums, long depth) {
    thread_local Room room;
    const bool order = a.column != 1 || b.columns >= WIDE;
    float* ordered = order ? room.of(BLOCK / TILE_ROWS * ordered_floats(DEPTH)) : nullptr;
    for (long k = 0; k < depth; k += DEPTH) {
        const long height = std::min(DEPTH, depth - k), packed_height = std::min(DEPTH, b.depth - k);
        const Matrix some = {a.at + k * a.column, a.row, a.column};
        if (order) order_rows(some, rows, height, ordered);
        for (long column = 0; column < b.columns; column += WIDTH) {
            const float* panel = b.panel(k, packed_height, column);
            for (long i = 0; i < rows; i += TILE_ROWS) {
                // Each tile asks for its share of the panel that comes next, which is not in a near cache yet.
                const long share = height * TILE_ROWS / rows + 1;
                const float* next = panel + (packed_height + i / TILE_ROWS * share) * WIDTH;
                if (order) for (long line = 0; line < share; ++line) __builtin_prefetch(next + line * WIDTH);
                const long together = std::min<long>(TILE_ROWS, rows - i);
                const float* own = order ? ordered + i / TILE_ROWS * ordered_floats(height) : some.at + i * some.row;
                float* to = sums.to + i * sums.to_row + column;
                const float* from = sums.from ? sums.from + i * sums.from_row + column : nullptr;
                const Sums here = k ? Sums{to, sums.to_row, to, sums.to_row} : Sums{from, sums.from_row, to, sums.to_row};
                const long width = std::min(WIDTH, b.columns - column);
                if (together < TILE_ROWS)
                    REST[order][together - 1](own, some.row, panel, height, here, width);
                else if (order)
                    multiply_panel<TILE_ROWS, true>(own, some.row, panel, height, here, width);
                else
                    multiply_panel<TILE_ROWS, false>(own, some.row, panel, height, here, width);
            }
        }
    }
}

static void multiply(Matrix a, long rows, const Panels& b, Sums sums) { multiply(a, rows, b, sums, b.depth); }

static Matrix plain(const float* at, long row) { return {at, row, 1}; }
static Matrix transposed(const float* at, long row) { return {at, 1, row}; }

// Where a product begins at zero, and where it adds to what is there.
static Sums into(float* to, long row) { return {nullptr, 0, to, row}; }
static Sums onto(float* to, long row) { return {to, row, to, row}; }

// Calls work(first, count) for every block of `each` rows, on all threads.
template <class F>
static void for_blocks(long rows, long each, F&& work) {
#pragma omp parallel for schedule(dynamic)
    for (long first = 0; first < rows; first += each) work(first, std::min(each, rows - first));
}

// The gradient of w in x·wᵀ: to (outputs, inputs) = gradientᵀ (tokens, outputs) · x (tokens, inputs), or added to it.
struct WeightGradient {
    Matrix gradient;
    long outputs;
    Matrix x;
    long inputs;
    float* to;
    bool add = false;
};

// Several together, the widest first: of few rows of one, threads would not have the same share.
template <size_t N>
static void weight_gradients(const WeightGradient (&all)[N], long tokens) {
    thread_local Room rooms[N];
    Packing packings[N];
    const long each = rows_together(all[0].inputs);
    long blocks = 0, ends[N];
    for (size_t i = 0; i < N; ++i) {
        packings[i] = {all[i].x, {rooms[i].of(Panels::floats(tokens, all[i].inputs)), tokens, all[i].inputs}};
        ends[i] = blocks += (all[i].outputs + each - 1) / each;
    }
    pack(packings);
#pragma omp parallel for schedule(dynamic)
    for (long number = 0; number < blocks; ++number) {
        const long i = std::upper_bound(ends, ends + N, number) - ends;
        const WeightGradient& own = all[i];
        const long first = (number - (i ? ends[i - 1] : 0)) * each, rows = std::min(each, own.outputs - first);
        float* to = own.to + first * own.inputs;
        const Matrix columns = {own.gradient.at + first * own.gradient.column, own.gradient.column, own.gradient.row};
        multiply(columns, rows, packings[i].to, own.add ? onto(to, own.inputs) : into(to, own.inputs));
    }
}
