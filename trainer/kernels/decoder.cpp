// A decoder's block in float32 on a CPU, forward and backward, and the head with its loss. Between products of such sizes
// torch would read and write all of memory again for each small operation; here a block of rows goes through everything while
// it lies in the cache.
//
// Shapes: T tokens (B sequences of L, one after another), D hidden, F feed-forward, A = heads·W and K = kv_heads·W, the widths
// of queries and of keys, V outputs. Matrices are torch's: (outputs, inputs), row after row.

#include "attention.h"

extern "C" {

struct Block {
    long batch, length, hidden, heads, kv_heads, width, ffn;
    float eps;
    const int64_t* starts;    // (B, L) the first position that each may see; null: the first of its sequence
    const float *cos, *sin;   // (L, W) of `rope_tables`: each pair's number in both halves, sines negative in the first
    const float *before, *q, *k, *v, *o, *after, *gate, *up, *down;  // gains of the norms (D), and matrices
    // Kept for the way back.
    const float* x;           // (T, D)
    float *x_scale, *qkv;     // (T) of the norm, and (T, A + 2K) turned
    float *attended, *sums;   // (T, A), and (B, H, L) logarithms of the sums of exponentials
    float *middle, *middle_scale, *both;  // (T, D), (T), and (T, 2F) what comes out of gate and up

    long tokens() const { return batch * length; }
    long queries() const { return heads * width; }
    long keys() const { return kv_heads * width; }
    long row() const { return queries() + 2 * keys(); }
    long together() const { return rows_together(hidden); }

    Head head(long sequence, long number) const {
        const float* at = qkv + sequence * length * row();
        const float* key = at + queries() + number / (heads / kv_heads) * width;
        return {at + number * width, key, key + keys(), row(), length, width, starts ? starts + sequence * length : nullptr};
    }
};

// `both` has first gate's and then up's; the matrices' are null where they are not wanted.
struct Gradients {
    float *x, *before, *qkv, *o, *after, *both, *down;
};

}  // extern "C"

namespace {

thread_local Room panels_of[4], rooms[4];

Panels panels(int number, long depth, long columns) {
    return {panels_of[number].of(Panels::floats(depth, columns)), depth, columns};
}

long blocks_of(long rows, long each) { return (rows + each - 1) / each; }

// Sums over rows of what blocks of them added up apart, so that the order is the same for any number of threads.
void add_up(const float* parts, long count, long width, float* to) {
    std::fill(to, to + width, 0.0f);
    for (long part = 0; part < count; ++part)
        for (long j = 0; j < width; ++j) to[j] += parts[part * width + j];
}

// Queries and keys of some rows, by their positions or back.
void turn_rows(const Block& b, long first, long rows, float sign, float* qkv) {
    for (long i = 0; i < rows; ++i) {
        const long place = (first + i) % b.length * b.width, half = b.width / 2;
        float* const row = qkv + i * b.row();
        for (float* head = row; head < row + b.queries() + b.keys(); head += b.width)
            turn(head, b.cos + place, b.sin + place + half, sign, half);
    }
}

void into_attention(const Block& b) {
    const long hidden = b.hidden, widths[3] = {b.queries(), b.keys(), b.keys()};
    const float* matrices[3] = {b.q, b.k, b.v};
    Packing packed[3];
    for (int i = 0; i < 3; ++i) packed[i] = {transposed(matrices[i], hidden), panels(i, hidden, widths[i])};
    pack(packed);
    for_blocks(b.tokens(), b.together(), [&](long first, long rows) {
        thread_local Room room;
        float *normed = room.of(BLOCK * hidden), *own = b.qkv + first * b.row(), *to = own;
        norm(b.x + first * hidden, b.before, rows, hidden, b.eps, b.x_scale + first, normed);
        for (int i = 0; i < 3; to += widths[i++]) multiply(plain(normed, hidden), rows, packed[i].to, into(to, b.row()));
        turn_rows(b, first, rows, 1.0f, own);
    });
}

void attend(const Block& b) {
#pragma omp parallel for schedule(dynamic)
    for (long number = 0; number < b.batch * b.heads; ++number) {
        const long sequence = number / b.heads, head = number % b.heads;
        float* to = b.attended + sequence * b.length * b.queries() + head * b.width;
        attend(b.head(sequence, head), to, b.queries(), b.sums + number * b.length);
    }
}

// middle = x + attended·oᵀ, out = middle + (silu(n·gateᵀ)·(n·upᵀ))·downᵀ with n the normed middle.
void out_of_attention(const Block& b, float* out) {
    const long hidden = b.hidden, ffn = b.ffn, queries = b.queries();
    const Panels o = panels(0, queries, hidden), gate_w = panels(1, hidden, ffn);
    const Panels up = panels(2, hidden, ffn), down = panels(3, ffn, hidden);
    pack({{transposed(b.o, queries), o}, {transposed(b.gate, hidden), gate_w}, {transposed(b.up, hidden), up}, {transposed(b.down, ffn), down}});
    for_blocks(b.tokens(), b.together(), [&](long first, long rows) {
        thread_local Room room;
        float *normed = room.of(BLOCK * (hidden + ffn)), *opened = normed + BLOCK * hidden;
        float *middle = b.middle + first * hidden, *both = b.both + first * 2 * ffn;
        multiply(plain(b.attended + first * queries, queries), rows, o, {b.x + first * hidden, hidden, middle, hidden});
        norm(middle, b.after, rows, hidden, b.eps, b.middle_scale + first, normed);
        multiply(plain(normed, hidden), rows, gate_w, into(both, 2 * ffn));
        multiply(plain(normed, hidden), rows, up, into(both + ffn, 2 * ffn));
        gate(both, rows, ffn, opened);
        multiply(plain(opened, ffn), rows, down, {middle, hidden, out + first * hidden, hidden});
    });
}

// Leaves in `to.x` the gradient of middle, which is x's too, and in `attended` (T, A) that of what was attended to.
void out_of_attention_back(const Block& b, const float* gradient, const Gradients& to, float* attended) {
    const long tokens = b.tokens(), hidden = b.hidden, ffn = b.ffn, queries = b.queries();
    const Panels o = panels(0, hidden, queries), gate_w = panels(1, ffn, hidden);
    const Panels up = panels(2, ffn, hidden), down = panels(3, hidden, ffn);
    pack({{plain(b.o, queries), o}, {plain(b.gate, hidden), gate_w}, {plain(b.up, hidden), up}, {plain(b.down, ffn), down}});
    float *normed = rooms[0].of(tokens * hidden), *opened = rooms[1].of(tokens * ffn), *both = rooms[2].of(tokens * 2 * ffn);
    float* gains = rooms[3].of(blocks_of(tokens, b.together()) * hidden);
    for_blocks(tokens, b.together(), [&](long first, long rows) {
        thread_local Room room;
        float *opened_gradient = room.of(BLOCK * ffn), *own = both + first * 2 * ffn, *back = to.x + first * hidden;
        const float *from = gradient + first * hidden, *middle = b.middle + first * hidden, *scale = b.middle_scale + first;
        multiply(plain(from, hidden), rows, down, into(opened_gradient, ffn));
        gate_back(opened_gradient, b.both + first * 2 * ffn, rows, ffn, own, opened + first * ffn);
        multiply(plain(own, 2 * ffn), rows, gate_w, into(back, hidden));
        multiply(plain(own + ffn, 2 * ffn), rows, up, onto(back, hidden));
        norm_again(middle, b.after, rows, hidden, scale, normed + first * hidden);
        norm_back(back, middle, b.after, scale, from, rows, hidden, back, gains + first / b.together() * hidden);
        multiply(plain(back, hidden), rows, o, into(attended + first * queries, queries));
    });
    add_up(gains, blocks_of(tokens, b.together()), hidden, to.after);
    if (!to.o) return;
    const WeightGradient down_gradient = {plain(gradient, hidden), hidden, plain(opened, ffn), ffn, to.down};
    const WeightGradient both_gradient = {plain(both, 2 * ffn), 2 * ffn, plain(normed, hidden), hidden, to.both};
    const WeightGradient o_gradient = {plain(to.x, hidden), hidden, plain(b.attended, queries), queries, to.o};
    weight_gradients({down_gradient, both_gradient, o_gradient}, tokens);
}

// Queries that share keys and values go one after another, since they add to the same gradients.
void attend_back(const Block& b, const float* attended, float* qkv) {
    const long group = b.heads / b.kv_heads;
#pragma omp parallel for schedule(dynamic)
    for (long number = 0; number < b.batch * b.kv_heads; ++number) {
        const long sequence = number / b.kv_heads, kv_head = number % b.kv_heads;
        float* key = qkv + sequence * b.length * b.row() + b.queries() + kv_head * b.width;
        for (long i = 0; i < b.length; ++i)
            for (float* at : {key + i * b.row(), key + i * b.row() + b.keys()}) std::fill(at, at + b.width, 0.0f);
        for (long head = kv_head * group; head < (kv_head + 1) * group; ++head) {
            const long at = sequence * b.length * b.queries() + head * b.width;
            float* query = qkv + sequence * b.length * b.row() + head * b.width;
            const float* sums = b.sums + (sequence * b.heads + head) * b.length;
            attend_back(b.head(sequence, head), b.attended + at, attended + at, b.queries(), sums, query, key, key + b.keys());
        }
    }
}

// Adds to what `to.x` has.
void into_attention_back(const Block& b, float* qkv, const Gradients& to) {
    const long tokens = b.tokens(), hidden = b.hidden, widths[3] = {b.queries(), b.keys(), b.keys()};
    const float* matrices[3] = {b.q, b.k, b.v};
    Packing packed[3];
    for (int i = 0; i < 3; ++i) packed[i] = {plain(matrices[i], hidden), panels(i, widths[i], hidden)};
    pack(packed);
    float *normed = rooms[0].of(tokens * hidden), *gains = rooms[3].of(blocks_of(tokens, b.together()) * hidden);
    for_blocks(tokens, b.together(), [&](long first, long rows) {
        thread_local Room room;
        float *back = room.of(BLOCK * hidden), *own = qkv + first * b.row(), *at = own, *x = to.x + first * hidden;
        turn_rows(b, first, rows, -1.0f, own);
        for (int i = 0; i < 3; at += widths[i++])
            multiply(plain(at, b.row()), rows, packed[i].to, i ? onto(back, hidden) : into(back, hidden));
        norm_again(b.x + first * hidden, b.before, rows, hidden, b.x_scale + first, normed + first * hidden);
        norm_back(back, b.x + first * hidden, b.before, b.x_scale + first, x, rows, hidden, x, gains + first / b.together() * hidden);
    });
    add_up(gains, blocks_of(tokens, b.together()), hidden, to.before);
    if (to.qkv) weight_gradients({{plain(qkv, b.row()), b.row(), plain(normed, hidden), hidden, to.qkv}}, tokens);
}

}  // namespace

extern "C" {

// `out` (T, D), and all that is kept.
void block_forward(const Block* block, float* out) {
    into_attention(*block);
    attend(*block);
    out_of_attention(*block, out);
}

void block_backward(const Block* block, const float* gradient, const Gradients* to) {
    thread_local Room attended_room, qkv_room;
    float *attended = attended_room.of(block->tokens() * block->queries()), *qkv = qkv_room.of(block->tokens() * block->row());
    out_of_attention_back(*block, gradient, *to, attended);
    attend_back(*block, attended, qkv);
    into_attention_back(*block, qkv, *to);
}

// y = x·gain/√(mean(x²) + eps) of each row of `x` (T, D); `scale` (T) is kept.
void norm_forward(long tokens, long hidden, float eps, const float* x, const float* gain, float* scale, float* y) {
    for_blocks(tokens, BLOCK, [&](long first, long rows) {
        norm(x + first * hidden, gain, rows, hidden, eps, scale + first, y + first * hidden);
    });
}

void norm_backward(long tokens, long hidden, const float* gradient, const float* x, const float* gain, const float* scale,
                   float* x_gradient, float* gain_gradient) {
    float* gains = rooms[3].of(blocks_of(tokens, BLOCK) * hidden);
    for_blocks(tokens, BLOCK, [&](long first, long rows) {
        const long at = first * hidden;
        std::fill(x_gradient + at, x_gradient + at + rows * hidden, 0.0f);
        norm_back(gradient + at, x + at, gain, scale + first, x_gradient + at, rows, hidden, x_gradient + at,
                  gains + first / BLOCK * hidden);
    });
    add_up(gains, blocks_of(tokens, BLOCK), hidden, gain_gradient);
}

// The summed cross-entropy of `targets` (T) under the logits x·headᵀ, which are never all there: `at_once` rows of them. Its
// gradients go to `x_gradient` (T, D) and `head_gradient` (V, D), each null where it is not wanted.
double head_and_loss(long tokens, long hidden, long outputs, long at_once, const float* x, const float* head,
                     const int64_t* targets, float* x_gradient, float* head_gradient) {
    const Panels forward = panels(0, hidden, outputs), back = panels(1, outputs, hidden);
    pack({{transposed(head, hidden), forward}, {plain(head, hidden), back}});
    const long row = Panels::padded(outputs), each = rows_together(hidden);
    float* logits = rooms[0].of(std::min(at_once, tokens) * row);
    double total = 0.0;
    for (long start = 0; start < tokens; start += at_once) {
        const long count = std::min(at_once, tokens - start);
        double* losses = (double*)rooms[1].of(2 * blocks_of(count, each));
        for_blocks(count, each, [&](long first, long rows) {
            float* own = logits + first * row;
            const long token = start + first;
            multiply(plain(x + token * hidden, hidden), rows, forward, into(own, row));
            double loss = 0.0;
            for (long i = 0; i < rows; ++i) loss += loss_of_row(own + i * row, outputs, row, targets[token + i]);
            losses[first / each] = loss;
            if (x_gradient) multiply(plain(own, row), rows, back, into(x_gradient + token * hidden, hidden));
        });
        for (long block = 0; block < blocks_of(count, each); ++block) total += losses[block];
        if (head_gradient)
            weight_gradients({{plain(logits, row), outputs, plain(x + start * hidden, hidden), hidden, head_gradient, start > 0}}, count);
    }
    return total;
}

}  // extern "C"
