// Causal attention: every position sees itself and what came before it, in its document where there are several. Queries go
// through in blocks, and of a block only the keys that it can see are multiplied. As in FlashAttention (Dao et al. 2022) no
// weights are kept: the way back makes them again from the logarithm of each row's sum.

#pragma once

#include "rows.h"

constexpr long QUERIES = 48;  // of a block

// One head's queries, and the keys and values that they look at: matrices (L, W) whose rows lie `row` apart. `starts` (L) has
// the first position that each may see; null: the very first.
struct Head {
    const float *q, *k, *v;
    long row, length, width;
    const int64_t* starts;

    long start(long position) const { return starts ? starts[position] : 0; }
    float scale() const { return 1.0f / std::sqrt((float)width); }
};

static long vectors(long count) { return (count + LANES - 1) / LANES * LANES; }

// Of the numbers from `first` to `end`; those that lie beside them in their vectors count as nothing from now on.
static float highest(float* row, long first, long end) {
    const long from = first / LANES * LANES;
    std::fill(row + from, row + first, -INFINITY);
    std::fill(row + end, row + vectors(end), -INFINITY);
    vec most = load(row + from);
    for (long j = from + LANES; j < end; j += LANES) most = load(row + j) > most ? load(row + j) : most;
    return largest(most);
}

// The numbers from `first` to `end` become e^(score·scale - less), the others up to `columns` zero; returns their sum.
static float weigh(float* row, long first, long end, long columns, float scale, float less) {
    const long from = first / LANES * LANES;
    vec total = {};
    for (long j = from; j < end; j += LANES) {
        vec p = exponential(load(row + j) * scale - less);
        if (j < first || j + LANES > end)
            for (long i = 0; i < LANES; ++i) p[i] = j + i < first || j + i >= end ? 0.0f : p[i];
        store(row + j, p);
        total += p;
    }
    std::fill(row, row + from, 0.0f);
    std::fill(row + vectors(end), row + columns, 0.0f);
    return sum(total);
}

// `to` (L, W) with rows `to_row` apart; `logarithms` (L) are kept.
static void attend(const Head& head, float* to, long to_row, float* logarithms) {
    thread_local Room rooms[3];
    const long length = head.length, width = head.width;
    const Panels keys = pack_here(transposed(head.k, head.row), width, length, rooms[0].of(Panels::floats(width, length)));
    const Panels values = pack_here(plain(head.v, head.row), length, width, rooms[1].of(Panels::floats(length, width)));
    float* scores = rooms[2].of(QUERIES * Panels::padded(length));
    for (long first = 0; first < length; first += QUERIES) {
        const long rows = std::min(QUERIES, length - first), seen = first + rows, row = Panels::padded(seen);
        multiply(plain(head.q + first * head.row, head.row), rows, {keys.at, width, seen}, into(scores, row));
        float shares[QUERIES];
        for (long i = 0; i < rows; ++i) {
            const long start = head.start(first + i), end = first + i + 1;
            const float most = highest(scores + i * row, start, end) * head.scale();
            const float total = weigh(scores + i * row, start, end, row, head.scale(), most);
            logarithms[first + i] = most + std::log(total);
            shares[i] = 1.0f / total;
        }
        float* out = to + first * to_row;
        multiply(plain(scores, row), rows, values, into(out, to_row), seen);
        for (long i = 0; i < rows; ++i)
            for (long j = 0; j < width; ++j) out[i * to_row + j] *= shares[i];
    }
}

// to (seen, W) += a (rows, seen)ᵀ · b (rows, W).
static void add_products(const float* a, long a_row, Matrix b, long rows, long seen, long width, float* to, long to_row) {
    thread_local Room room;
    const Panels panels = pack_here(b, rows, width, room.of(Panels::floats(QUERIES, width)));
    for (long key = 0; key < seen; key += QUERIES)
        multiply(transposed(a + key, a_row), std::min(QUERIES, seen - key), panels, onto(to + key * to_row, to_row));
}

// `out` and `from`, its gradient, are (L, W) with rows `out_row` apart; the gradients of queries, keys and values lie as those
// do, and the latter two are added to.
static void attend_back(const Head& head, const float* out, const float* from, long out_row, const float* logarithms,
                        float* q_gradient, float* k_gradient, float* v_gradient) {
    thread_local Room rooms[5];
    const long length = head.length, width = head.width;
    const Panels keys = pack_here(transposed(head.k, head.row), width, length, rooms[0].of(Panels::floats(width, length)));
    const Panels values = pack_here(transposed(head.v, head.row), width, length, rooms[1].of(Panels::floats(width, length)));
    const Panels keys_down = pack_here(plain(head.k, head.row), length, width, rooms[2].of(Panels::floats(length, width)));
    float *weights = rooms[3].of(QUERIES * Panels::padded(length)), *scores = rooms[4].of(QUERIES * Panels::padded(length));
    for (long first = 0; first < length; first += QUERIES) {
        const long rows = std::min(QUERIES, length - first), seen = first + rows, row = Panels::padded(seen);
        const Matrix queries = plain(head.q + first * head.row, head.row), own = plain(from + first * out_row, out_row);
        multiply(queries, rows, {keys.at, width, seen}, into(weights, row));
        multiply(own, rows, {values.at, width, seen}, into(scores, row));
        for (long i = 0; i < rows; ++i) {
            float *p = weights + i * row, *gradient = scores + i * row;
            const long end = first + i + 1, beyond = vectors(end);
            weigh(p, head.start(first + i), end, row, head.scale(), logarithms[first + i]);
            const float *result = out + (first + i) * out_row, *of_result = from + (first + i) * out_row;
            float mean = 0.0f;
            for (long j = 0; j < width; ++j) mean += result[j] * of_result[j];
            for (long j = 0; j < beyond; j += LANES)
                store(gradient + j, load(p + j) * (load(gradient + j) - mean) * head.scale());
            std::fill(gradient + beyond, gradient + row, 0.0f);
        }
        multiply(plain(scores, row), rows, keys_down, into(q_gradient + first * head.row, head.row), seen);
        add_products(weights, row, own, rows, seen, width, v_gradient, head.row);
        add_products(scores, row, queries, rows, seen, width, k_gradient, head.row);
    }
}
