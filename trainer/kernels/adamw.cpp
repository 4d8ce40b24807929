// AdamW (Loshchilov and Hutter 2019) in one pass over all parameters, float32, and the norm that clips before it. Parameters
// of any sizes go by in pieces, which threads share and whose sums are added up in the order in which they lie: the number
// of threads changes no bit.

#include <algorithm>
#include <cmath>
#include <vector>

namespace {

constexpr long PIECE = 1 << 14;

long pieces_of(long numbers) { return (numbers + PIECE - 1) / PIECE; }

// Calls work(tensor, first, count, number of the piece) for all pieces, on all threads.
template <class F>
void for_pieces(long tensors, const long* numbers, F&& work) {
    thread_local std::vector<long> room;
    room.resize(tensors);
    long pieces = 0;
    for (long i = 0; i < tensors; ++i) room[i] = pieces += pieces_of(numbers[i]);
    const long* ends = room.data();
#pragma omp parallel for schedule(dynamic)
    for (long piece = 0; piece < pieces; ++piece) {
        const long i = std::upper_bound(ends, ends + tensors, piece) - ends;
        const long first = (piece - (i ? ends[i - 1] : 0)) * PIECE;
        work(i, first, std::min(PIECE, numbers[i] - first), piece);
    }
}

}  // namespace

extern "C" {

double sum_of_squares(long tensors, const long* numbers, const float* const* values) {
    thread_local std::vector<double> room;
    long pieces = 0;
    for (long i = 0; i < tensors; ++i) pieces += pieces_of(numbers[i]);
    room.resize(pieces);
    double* sums = room.data();
    for_pieces(tensors, numbers, [&](long i, long first, long count, long piece) {
        const float* from = values[i] + first;
        double sum = 0.0;
#pragma omp simd reduction(+ : sum)
        for (long j = 0; j < count; ++j) sum += (double)from[j] * from[j];
        sums[piece] = sum;
    });
    double total = 0.0;
    for (long piece = 0; piece < pieces; ++piece) total += sums[piece];
    return total;
}

// torch.optim.AdamW's step with gradients times `factor`. `steps` are torch's: the number of those made, a float each.
void adamw_step(long tensors, const long* numbers, float* const* weights, const float* const* gradients, float* const* means,
                float* const* squares, float* const* steps, double factor, double lr, double beta1, double beta2, double eps,
                double decay) {
    for (long i = 0; i < tensors; ++i) *steps[i] += 1.0f;
    for_pieces(tensors, numbers, [&](long i, long first, long count, long) {
        float *w = weights[i] + first, *m = means[i] + first, *v = squares[i] + first;
        const float* from = gradients[i] + first;
        const float rate = lr / (1.0 - std::pow(beta1, *steps[i])), root = 1.0 / std::sqrt(1.0 - std::pow(beta2, *steps[i]));
        const float kept = 1.0 - lr * decay, scale = factor, fresh1 = 1.0 - beta1, old2 = beta2, fresh2 = 1.0 - beta2, least = eps;
#pragma omp simd
        for (long j = 0; j < count; ++j) {
            const float g = from[j] * scale;
            m[j] += fresh1 * (g - m[j]);
            v[j] = old2 * v[j] + fresh2 * g * g;
            w[j] = kept * w[j] - rate * m[j] / (std::sqrt(v[j]) * root + least);
        }
    });
}

}  // extern "C"
