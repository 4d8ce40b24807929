// A model's layers for the rows of one step, in one call: between two products there is no way back to Python, and the
// other threads find the next piece of work before they fall asleep. What a layer is made of can be called by itself too.

#include "attention.h"
#include "linear.h"

// Laid out as in cpu.py.
struct Layer {
    const float *attention_norm, *ffn_norm, *q_norm, *k_norm;  // the last two may be null
    Weights qkv, out, gate_up, down;
    void* cache;
};

struct Shape {
    long layers, hidden, ffn, heads, kv_heads, dim, half_cache;
    float eps;

    long qkv() const { return (heads + 2 * kv_heads) * dim; }
    Cache cache(const Layer& layer) const { return {layer.cache, half_cache != 0, kv_heads, dim}; }
};

// Rows in parts that are worth handing to another thread.
template <class F>
static void each_row(long rows, long threads, F&& work) {
    constexpr long PART = 16;
    Pool::shared().run((rows + PART - 1) / PART, threads, [&](long part) {
        for (long r = part * PART; r < std::min(rows, (part + 1) * PART); ++r) work(r);
    });
}

// y = x / √(mean x² + eps) · weight.
static void norm_row(const float* x, const float* weight, float eps, long size, float* y) {
    vec squares = {};
    for (long i = 0; i < size; i += LANES) squares += load(x + i) * load(x + i);
    const float by = 1.0f / std::sqrt(sum(squares) / size + eps);
    for (long i = 0; i < size; i += LANES) store(y + i, load(x + i) * by * load(weight + i));
}

// Turns each pair (i, i + dim/2) of a head by its angle; sin's first half is negated (see rope_table).
static void rotate_heads(float* x, long heads, long dim, const float* cos, const float* sin) {
    const long half = dim / 2;
    for (float* end = x + heads * dim; x != end; x += dim)
        for (long i = 0; i < half; ++i) {
            const float a = x[i], b = x[i + half];
            x[i] = a * cos[i] + b * sin[i];
            x[i + half] = b * cos[i + half] + a * sin[i + half];
        }
}

static void silu_row(const float* gate, long size, float* y) {
    for (long i = 0; i < size; i += LANES) {
        const vec g = load(gate + i);
        store(y + i, g / (1.0f + vexp(-g)) * load(gate + size + i));
    }
}

struct Step {  // laid out as in cpu.py
    long rows;
    const float *cos, *sin;  // row × D
    Batch batch;
    long threads;
};

// x + attention(norm(x)), and then + ffn(norm(x)), in place. `near` and `far` are room for what lies between.
static void layer_forward(const Shape& s, const Layer& l, const Step& step, float* x, float* near, float* far) {
    const long rows = step.rows, threads = step.threads, hidden = s.hidden, qkv = s.qkv();
    const Cache cache = s.cache(l);
    each_row(rows, threads, [&](long r) { norm_row(x + r * hidden, l.attention_norm, s.eps, hidden, near + r * hidden); });
    linear(l.qkv, {near, hidden}, rows, far, qkv, false, threads);
    each_row(rows, threads, [&](long r) {
        float *q = far + r * qkv, *k = q + s.heads * s.dim, *v = k + s.kv_heads * s.dim;
        for (long h = 0; l.q_norm && h < s.heads + s.kv_heads; ++h)
            norm_row(q + h * s.dim, h < s.heads ? l.q_norm : l.k_norm, s.eps, s.dim, q + h * s.dim);
        rotate_heads(q, s.heads + s.kv_heads, s.dim, step.cos + r * s.dim, step.sin + r * s.dim);
        cache.put_token(step.batch.slots[r], k, v);
    });
    Attention{far, qkv, s.heads, cache, step.batch, near}.run(threads);
    linear(l.out, {near, s.heads * s.dim}, rows, x, hidden, true, threads);
    each_row(rows, threads, [&](long r) { norm_row(x + r * hidden, l.ffn_norm, s.eps, hidden, near + r * hidden); });
    linear(l.gate_up, {near, hidden}, rows, far, 2 * s.ffn, false, threads);
    each_row(rows, threads, [&](long r) { silu_row(far + 2 * r * s.ffn, s.ffn, near + r * s.ffn); });
    linear(l.down, {near, s.ffn}, rows, x, hidden, true, threads);
}

extern "C" {

long panel_columns() { return PANEL; }
long group_inputs() { return GROUP; }
long block_tokens() { return BLOCK; }
long rounds_activations() { return PAIRS; }  // to bfloat16, where weights are bfloat16

void forward(const Shape* shape, const Layer* layers, const Step* step, float* x) {
    static std::vector<float> near, far;
    const size_t widest = std::max({shape->hidden, shape->ffn, shape->heads * shape->dim});
    near.resize(std::max(near.size(), step->rows * widest));
    far.resize(std::max(far.size(), (size_t)step->rows * std::max(shape->qkv(), 2 * shape->ffn)));
    for (long i = 0; i < shape->layers; ++i) layer_forward(*shape, layers[i], *step, x, near.data(), far.data());
}

void linear(const Weights* w, const float* x, long x_stride, long rows, float* y, long threads) {
    linear(*w, {x, x_stride}, rows, y, w->outputs, false, threads);
}

// Rows of a float32 or bfloat16 weight, as float32.
void rows_of(const Weights* w, const long* ids, long rows, float* y, long threads) {
    each_row(rows, threads, [&](long r) {
        const long panel = ids[r] / PANEL * w->inputs * PANEL, column = ids[r] % PANEL;
        for (long k = 0; k < w->inputs; ++k) {
            if (w->format == F32) y[r * w->inputs + k] = ((const float*)w->data)[panel + k * PANEL + column];
            else {
                const uint16_t half = ((const uint16_t*)w->data)[panel + (k & ~1L) * PANEL + 2 * column + (k & 1)];
                const uint32_t bits = (uint32_t)half << 16;
                memcpy(&y[r * w->inputs + k], &bits, 4);
            }
        }
    });
}

void rms_norm(const float* x, const float* weight, float eps, long rows, long size, float* y, long threads) {
    each_row(rows, threads, [&](long r) { norm_row(x + r * size, weight, eps, size, y + r * size); });
}

// Heads in place: a row is heads · D, `stride` from row to row.
void rotate(float* x, long stride, long rows, long heads, long dim, const float* cos, const float* sin, long threads) {
    each_row(rows, threads, [&](long r) { rotate_heads(x + r * stride, heads, dim, cos + r * dim, sin + r * dim); });
}

// y (rows × size) = silu(gate) · up, where a row of x is gate and then up.
void silu_multiply(const float* x, long rows, long size, float* y, long threads) {
    each_row(rows, threads, [&](long r) { silu_row(x + 2 * r * size, size, y + r * size); });
}

// Stores the new keys and values, and writes each token's attention over its own sequence to `out`.
// `q`, `k`, `v` are parts of rows that are `stride` long.
void attend(
    const Shape* shape, const Layer* layer, const Step* step, const float* q, const float* k, const float* v, long stride,
    float* out) {
    const Cache cache = shape->cache(*layer);
    each_row(step->rows, step->threads, [&](long r) { cache.put_token(step->batch.slots[r], k + r * stride, v + r * stride); });
    Attention{q, stride, shape->heads, cache, step->batch, out}.run(step->threads);
}
}
