// Attention over the paged cache, read where it lies: nothing is gathered and no key is copied for the heads that share it.
//
// A layer's cache is blocks of BLOCK tokens: block × (k, v) × head × BLOCK·D values, in float32 or bfloat16. Keys lie
// dimension after dimension and values token after token, which is how the tile reads them: scores are q times a block
// of keys, and the answer is probabilities times a block of values. Several rows of queries share what was read: the
// heads of one group, and neighbouring tokens of a prompt.

#include "pool.h"
#include "tile.h"

constexpr long BLOCK = 16;            // tokens
constexpr int SPAN = BLOCK / LANES;   // vectors of BLOCK values
constexpr size_t TILES_TOGETHER = 4;  // that look at one block while it is in the first cache

typedef uint16_t half_at __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

struct Item { long row, tokens, computed, table; };  // of the flat batch; `table`: where its blocks begin in `tables`

struct Cache {
    void* data;
    bool half;
    long kv_heads, dim;

    long at(long block, long kv, long head) const { return ((block * 2 + kv) * kv_heads + head) * BLOCK * dim; }

    void put(long index, float value) const {
        if (half) ((uint16_t*)data)[index] = float_to_bf16(value);
        else ((float*)data)[index] = value;
    }

    // BLOCK · dim values in float32: where they are, or widened into `scratch`.
    const float* block(long index, float* scratch) const {
        if (!half) return (const float*)data + index;
        for (long i = 0; i < BLOCK * dim; i += LANES) {
            const half_at bits = *(const half_at*)((const uint16_t*)data + index + i);
            store(scratch + i, (vec)(__builtin_convertvector(bits, uvec) << 16));
        }
        return scratch;
    }
};

struct Queries {
    const float* q;  // token × head × D, `stride` from token to token
    long stride, group;
    float scale;
    float* out;  // token × head · D
    long out_stride;
};

// Some tiles of one sequence's rows (token · group + head of the group) at one key head.
struct Unit { const Item* item; long head; std::vector<Tile> tiles; };

struct Scratch {
    std::vector<float> q, scores, probs, out, block;
    void reserve(long rows, long width, long dim) {
        q.resize(rows * dim), out.assign(rows * dim, 0.0f), block.resize(BLOCK * dim);
        scores.resize(rows * width), probs.resize(rows * width);
    }
};

static void put_tokens(const Cache& cache, const Item& item, const long* tables, const float* k, const float* v, long stride) {
    for (long t = 0; t < item.tokens; ++t) {
        const long position = item.computed + t, offset = position % BLOCK;
        const long block = tables[item.table + position / BLOCK];
        const float *from_k = k + (item.row + t) * stride, *from_v = v + (item.row + t) * stride;
        for (long h = 0; h < cache.kv_heads; ++h) {
            const long to_k = cache.at(block, 0, h) + offset, to_v = cache.at(block, 1, h) + offset * cache.dim;
            for (long d = 0; d < cache.dim; ++d) {
                cache.put(to_k + d * BLOCK, from_k[h * cache.dim + d]);
                cache.put(to_v + d, from_v[h * cache.dim + d]);
            }
        }
    }
}

// Positions that a row sees: all before its token, and the token itself.
static inline long visible(const Unit& unit, long row, long group) { return unit.item->computed + row / group + 1; }

// probs[p · R + r] = e^(score − largest), 0 where the row does not look. Returns 1 / sum.
static float softmax(float* scores, long seen, long width, float* probs, long rows, long r) {
    for (long p = seen; p < width; ++p) scores[p] = -INFINITY;
    vec top = load(scores);
    for (long p = LANES; p < width; p += LANES) top = load(scores + p) > top ? load(scores + p) : top;
    float largest = top[0];
    for (int i = 1; i < LANES; ++i) largest = std::max(largest, top[i]);
    vec total = {};
    for (long p = 0; p < width; p += LANES) {
        vec e = vexp(load(scores + p) - largest);
        for (long i = std::max(0L, seen - p); i < LANES; ++i) e[i] = 0.0f;
        total += e;
        for (int i = 0; i < LANES; ++i) probs[(p + i) * rows + r] = e[i];
    }
    return 1.0f / sum(total);
}

static void attend_unit(const Unit& unit, const Cache& cache, const Queries& queries, const long* tables, Scratch& s) {
    const long dim = cache.dim, group = queries.group, first = unit.tiles.front().first;
    const Tile last = unit.tiles.back();
    const long rows = last.first + last.rows - first, blocks = (visible(unit, last.first + last.rows - 1, group) + BLOCK - 1) / BLOCK;
    const long width = blocks * BLOCK;
    s.reserve(rows, width, dim);
    auto query = [&](long row) { return (unit.item->row + row / group) * queries.stride + (unit.head * group + row % group) * dim; };
    for (const Tile& tile : unit.tiles)
        for (long r = 0; r < tile.rows; ++r)
            for (long d = 0; d < dim; ++d)
                s.q[(tile.first - first) * dim + d * tile.rows + r] = queries.q[query(tile.first + r) + d] * queries.scale;

    for (long b = 0; b < blocks; ++b) {
        const float* keys = cache.block(cache.at(tables[unit.item->table + b], 0, unit.head), s.block.data());
        for (const Tile& tile : unit.tiles)
            with_rows(tile.rows, [&]<int R>() {
                vec acc[R][SPAN] = {};
                multiply<R, SPAN>(&s.q[(tile.first - first) * dim], keys, BLOCK, dim, acc);
                for (int r = 0; r < R; ++r)
                    for (int v = 0; v < SPAN; ++v)
                        store(&s.scores[(tile.first - first + r) * width + b * BLOCK + v * LANES], acc[r][v]);
            });
    }
    std::vector<float> inverse(rows);
    for (const Tile& tile : unit.tiles)
        for (long r = 0; r < tile.rows; ++r) {
            const long row = tile.first - first + r;
            inverse[row] = softmax(
                &s.scores[row * width], visible(unit, tile.first + r, group), width,
                &s.probs[(tile.first - first) * width], tile.rows, r);
        }
    for (long b = 0; b < blocks; ++b) {
        const float* values = cache.block(cache.at(tables[unit.item->table + b], 1, unit.head), s.block.data());
        for (const Tile& tile : unit.tiles)
            with_rows(tile.rows, [&]<int R>() {
                const float* probs = &s.probs[(tile.first - first) * width + b * BLOCK * R];
                for (long d = 0; d < dim; d += BLOCK) {
                    vec acc[R][SPAN] = {};
                    multiply<R, SPAN>(probs, values + d, dim, BLOCK, acc);
                    for (int r = 0; r < R; ++r)
                        for (int v = 0; v < SPAN; ++v) {
                            float* to = &s.out[(tile.first - first + r) * dim + d + v * LANES];
                            store(to, load(to) + acc[r][v]);
                        }
                }
            });
    }
    for (long row = 0; row < rows; ++row) {
        const long at = first + row;
        float* to = queries.out + (unit.item->row + at / group) * queries.out_stride + (unit.head * group + at % group) * dim;
        for (long d = 0; d < dim; ++d) to[d] = s.out[row * dim + d] * inverse[row];
    }
}

static std::vector<Unit> units(const Item* items, long count, long kv_heads, long group) {
    std::vector<Unit> result;
    for (long i = 0; i < count; ++i) {
        const std::vector<Tile> all = tiles(items[i].tokens * group);
        for (long head = 0; head < kv_heads; ++head)
            for (size_t t = 0; t < all.size(); t += TILES_TOGETHER)
                result.push_back({&items[i], head, {all.begin() + t, all.begin() + std::min(t + TILES_TOGETHER, all.size())}});
    }
    return result;
}

extern "C" {

long block_tokens() { return BLOCK; }

// Stores the new keys and values, and writes each token's attention over its own sequence to `out`.
// `q`, `k`, `v` are parts of rows that are `stride` long; `items` is count × (row, tokens, computed, table).
void attend(
    const float* q, const float* k, const float* v, long stride, void* cache_data, long half, long heads, long kv_heads,
    long dim, const long* items_data, long count, const long* tables, float* out, long threads) {
    const Item* items = (const Item*)items_data;
    const Cache cache{cache_data, half != 0, kv_heads, dim};
    const Queries queries{q, stride, heads / kv_heads, 1.0f / std::sqrt((float)dim), out, heads * dim};
    const std::vector<Unit> work = units(items, count, kv_heads, queries.group);
    Pool& pool = Pool::shared();
    pool.run(count, threads, [&](long i) { put_tokens(cache, items[i], tables, k, v, stride); });
    pool.run(work.size(), threads, [&](long u) {
        static thread_local Scratch scratch;
        attend_unit(work[u], cache, queries, tables, scratch);
    });
}
}
