// What the kernels offer the host code: launch functions, nothing of torch. Defined for float, double, __nv_bfloat16
// and __half in linear_logprob.cu, for float and double in weighted_dpo.cu.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace ldalign_cuda {

// Sums are kept in float32, in double for double.
template <typename T>
struct WideOf {
    using type = float;
};
template <>
struct WideOf<double> {
    using type = double;
};
template <typename T>
using Wide = typename WideOf<T>::type;

// A column's log-sum-exp in the making: the largest score, and the sum of exp(score - largest).
template <typename W>
struct Stats {
    W largest, total;
};

// The options of a pair's loss (kernels/loss_options.py).
template <typename W>
struct LossOptions {
    bool ipo;
    W nll, label_smoothing;
    bool length_normalised;
};

// Scores lie transposed: z is (V, n), one column a token, `ld` elements from one row to the next. z must be aligned to
// 16 bytes and ld be a multiple of 16 / sizeof(T); then every row of z is aligned, whatever V is. V < 2^31. What lies in a row
// behind its n columns, up to the next multiple of 16 / sizeof(T), may be read and written, and is never used.
template <typename T>
struct Scores {
    T* z;
    int64_t V, n, ld;
};

// Into how many chunks of the vocabulary logprob() cuts the scores. Depends on shapes only: same bits on every run.
int64_t stats_chunks(int64_t V, int64_t n, int64_t element_size);

// lse[i] = log sum_v exp z[v, i] and logp[i] = z[target[i], i] - lse[i], or 0 where target[i] == ignore_index.
// Any other target outside [0, V) stops the kernel (an assertion; nothing is read). partial: room for n * chunks.
template <typename T>
void logprob(
    Scores<T> scores, const int64_t* target, int64_t ignore_index, Stats<Wide<T>>* partial, Wide<T>* logp, Wide<T>* lse,
    cudaStream_t stream);

// In place z[v, i] <- coefficient[i] * ([v + first == target[i]] - exp(z[v, i] - lse[i])), rounded once; 0 where
// target[i] is negative. `first`: which word of the vocabulary the first row of z is.
template <typename T>
void score_gradient(
    Scores<T> scores, int64_t first, const int64_t* target, const Wide<T>* lse, const Wide<T>* coefficient,
    cudaStream_t stream);

// For each of P pairs, whose real and generated responses are rows [start[2p], start[2p + 1]) and [start[2p + 1],
// start[2p + 2]) of logp: sums[2p], sums[2p + 1], and for each of its rows the derivative of
// scale * weight[p] * -log sigmoid(beta * Delta), or of the loss that the options make, in that row's log-prob.
template <typename W>
void pair_coefficients(
    const W* logp, const int64_t* start, int64_t pairs, const W* reference, const W* weight, double beta, double scale,
    LossOptions<W> options, W* sums, W* coefficient, cudaStream_t stream);

// loss[0] = sum_p weight[p] * each[p], coefficient = d loss[0] / d real[p]; with x = chosen - rejected, each is
// -log sigmoid(x) + smoothing * x or, with ipo, (x - 1/2)^2 / beta^2.
template <typename W>
void weighted_dpo(
    const W* real, const W* generated, const W* ref_real, const W* ref_generated, const W* weight, int64_t pairs,
    double beta, bool ipo, double smoothing, W* loss, W* each, W* chosen, W* rejected, W* coefficient,
    cudaStream_t stream);

}  // namespace ldalign_cuda
