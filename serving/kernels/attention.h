// Attention over the paged cache, read where it lies: nothing is gathered and no key is copied for the heads that share it.
//
// A layer's cache is blocks of BLOCK tokens: block × (k, v) × head × BLOCK·D values, in float32 or bfloat16. Keys lie
// dimension after dimension and values token after token, which is how the tile reads them: scores are q times a block
// of keys, and the answer is probabilities times a block of values. Several rows of queries share what was read: the
// heads of one group, and neighbouring tokens of a prompt.

#pragma once

#include "pool.h"
#include "tile.h"

constexpr long BLOCK = 16;            // tokens
constexpr int SPAN = BLOCK / LANES;   // vectors of BLOCK values
constexpr size_t TILES_TOGETHER = 4;  // that look at one block while it is in the first cache

typedef uint16_t half_at __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

struct Item { long row, tokens, computed, table; };  // of the flat batch; `table`: where its blocks begin in `tables`

// What a step attends: its sequences, their blocks, and each row's place (block · BLOCK + offset) in the cache.
struct Batch { const Item* items; long count; const long *tables, *slots; };

struct Cache {
    void* data;
    bool half;
    long kv_heads, dim;

    long at(long block, long kv, long head) const { return ((block * 2 + kv) * kv_heads + head) * BLOCK * dim; }

    // What is no number is kept as 0. Whoever has the block next gives weight 0 to what lies behind its own tokens, and
    // 0 · NaN is NaN: one request that overflows would spoil others' answers.
    void put(long index, float value) const {
        if (!std::isfinite(value)) value = 0.0f;
        if (half) ((uint16_t*)data)[index] = float_to_bf16(value);
        else ((float*)data)[index] = value;
    }

    // Stores a token's keys and values, each head · D.
    void put_token(long slot, const float* k, const float* v) const {
        for (long h = 0; h < kv_heads; ++h) {
            const long to_k = at(slot / BLOCK, 0, h) + slot % BLOCK, to_v = at(slot / BLOCK, 1, h) + slot % BLOCK * dim;
            for (long d = 0; d < dim; ++d) {
                put(to_k + d * BLOCK, k[h * dim + d]);
                put(to_v + d, v[h * dim + d]);
            }
        }
    }

    // What of the block after this one is to come while `parts` tiles, one after another, compute with this one.
    Ahead ahead(const long* table, long b, long blocks, long kv, long head, long parts) const {
        const long bytes = half ? 2 : 4, next = std::min(b + 1, blocks - 1);
        return {(const char*)data + at(table[next], kv, head) * bytes, BLOCK * bytes / parts};
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

// Some tiles of one sequence's rows (token · group + head of the group) at one key head.
struct Unit { const Item* item; long head; std::vector<Tile> tiles; };

struct Scratch {
    std::vector<float> scores, out, block;
    void reserve(long rows, long width, long dim) {
        scores.resize(rows * width), out.assign(rows * dim, 0.0f), block.resize(BLOCK * dim);
    }
};

// scores[p] → e^(scale · (score − largest)), and 0 from `seen` to `width`. Returns 1 / sum.
static float softmax(float* scores, float scale, long seen, long width) {
    for (long p = seen; p < width; ++p) scores[p] = -INFINITY;
    vec top = load(scores);
    for (long p = LANES; p < width; p += LANES) top = load(scores + p) > top ? load(scores + p) : top;
    float largest = top[0];
    for (int i = 1; i < LANES; ++i) largest = std::max(largest, top[i]);
    vec total = {};
    for (long p = 0; p < width; p += LANES) {
        const vec score = load(scores + p);
        const vec e = score > all(-INFINITY) ? vexp((score - largest) * scale) : vec{};
        total += e;
        store(scores + p, e);
    }
    return 1.0f / sum(total);
}

struct Attention {
    const float* q;  // token × head · D, `stride` from token to token
    long stride, heads;
    Cache cache;
    Batch batch;
    float* out;  // token × head · D
    long group = heads / cache.kv_heads;

    // Where a row's token and head are, in rows that are `stride` long.
    long place(const Unit& unit, long row, long stride) const {
        return (unit.item->row + row / group) * stride + (unit.head * group + row % group) * cache.dim;
    }

    // Positions that a row sees: all before its token, and the token itself.
    long visible(const Unit& unit, long row) const { return unit.item->computed + row / group + 1; }

    void operator()(const Unit& unit, Scratch& s) const {
        const long dim = cache.dim, first = unit.tiles.front().first, last = unit.tiles.back().first + unit.tiles.back().rows;
        const long blocks = (visible(unit, last - 1) + BLOCK - 1) / BLOCK, width = blocks * BLOCK;
        const long* table = batch.tables + unit.item->table;
        s.reserve(last - first, width, dim);
        for (long b = 0; b < blocks; ++b) {
            const float* keys = cache.block(cache.at(table[b], 0, unit.head), s.block.data());
            Ahead ahead = cache.ahead(table, b, blocks, 0, unit.head, unit.tiles.size());
            for (const Tile& tile : unit.tiles) {
                with_rows(tile.rows, [&](auto height) {
                    constexpr int R = height;
                    vec acc[R][SPAN] = {};
                    const float* from[R];
                    UNROLLED for (int r = 0; r < R; ++r) from[r] = q + place(unit, tile.first + r, stride);
                    multiply<R, SPAN>(from, keys, BLOCK, dim, ahead, acc);
                    UNROLLED for (int r = 0; r < R; ++r)
                        UNROLLED for (int v = 0; v < SPAN; ++v)
                            store(&s.scores[(tile.first - first + r) * width + b * BLOCK + v * LANES], acc[r][v]);
                });
                ahead.at += dim * ahead.by;
            }
        }
        std::vector<float> inverse(last - first);
        const float scale = 1.0f / std::sqrt((float)dim);
        for (long row = first; row < last; ++row)
            inverse[row - first] = softmax(&s.scores[(row - first) * width], scale, visible(unit, row), width);
        for (long b = 0; b < blocks; ++b) {
            const float* values = cache.block(cache.at(table[b], 1, unit.head), s.block.data());
            Ahead ahead = cache.ahead(table, b, blocks, 1, unit.head, unit.tiles.size());
            for (const Tile& tile : unit.tiles)
                with_rows(tile.rows, [&](auto height) {
                    constexpr int R = height;
                    const float* from[R];
                    UNROLLED for (int r = 0; r < R; ++r) from[r] = &s.scores[(tile.first - first + r) * width + b * BLOCK];
                    for (long d = 0; d < dim; d += BLOCK, ahead.at += BLOCK * ahead.by) {
                        vec acc[R][SPAN] = {};
                        multiply<R, SPAN>(from, values + d, dim, BLOCK, ahead, acc);
                        UNROLLED for (int r = 0; r < R; ++r)
                            UNROLLED for (int v = 0; v < SPAN; ++v) {
                                float* to = &s.out[(tile.first - first + r) * dim + d + v * LANES];
                                store(to, load(to) + acc[r][v]);
                            }
                    }
                });
        }
        for (long row = first; row < last; ++row) {
            float* to = out + place(unit, row, heads * dim);
            for (long d = 0; d < dim; ++d) to[d] = s.out[(row - first) * dim + d] * inverse[row - first];
        }
    }

    void run(long threads) const {
        std::vector<Unit> units;
        for (long i = 0; i < batch.count; ++i) {
            const std::vector<Tile> all = tiles(batch.items[i].tokens * group);
            for (long head = 0; head < cache.kv_heads; ++head)
                for (size_t t = 0; t < all.size(); t += TILES_TOGETHER)
                    units.push_back(
                        {&batch.items[i], head, {all.begin() + t, all.begin() + std::min(t + TILES_TOGETHER, all.size())}});
        }
        Pool::shared().run(units.size(), threads, [&](long u) {
            static thread_local Scratch scratch;
            (*this)(units[u], scratch);
        });
    }
};
