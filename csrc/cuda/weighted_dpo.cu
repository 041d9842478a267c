// The weighted DPO loss of P pairs, its parts and its derivative, in one kernel of one block: P is a few thousand at
// most, and one block adds the loss up in one order, so a run repeats bit for bit.

#include "common.cuh"

namespace ldalign_cuda {
namespace {

template <typename W>
__global__ void __launch_bounds__(kThreads, 3) dpo_terms(
    const W* real, const W* generated, const W* ref_real, const W* ref_generated, const W* weight, int64_t pairs,
    W beta, bool ipo, W smoothing, W* loss, W* each, W* chosen, W* rejected, W* coefficient) {
    W total = 0;
    for (int64_t p = threadIdx.x; p < pairs; p += kThreads) {
        const W a = beta * (real[p] - ref_real[p]), b = beta * (generated[p] - ref_generated[p]);
        const W x = a - b;
        const W l = ipo ? (x - W(0.5)) * (x - W(0.5)) / (beta * beta) : minus_log_sigmoid(x) + smoothing * x;
        chosen[p] = a;
        rejected[p] = b;
        each[p] = l;
        coefficient[p] = -beta * weight[p] * pull(x, beta, ipo, smoothing);
        total += weight[p] * l;
    }
    total = block_sum(total);
    if (threadIdx.x == 0) *loss = total;
}

}  // namespace

template <typename W>
void weighted_dpo(
    const W* real, const W* generated, const W* ref_real, const W* ref_generated, const W* weight, int64_t pairs,
    double beta, bool ipo, double smoothing, W* loss, W* each, W* chosen, W* rejected, W* coefficient,
    cudaStream_t stream) {
    launch(
        dpo_terms<W>, dim3(1), stream, real, generated, ref_real, ref_generated, weight, pairs, static_cast<W>(beta),
        ipo, static_cast<W>(smoothing), loss, each, chosen, rejected, coefficient);
}

template void weighted_dpo<float>(
    const float*, const float*, const float*, const float*, const float*, int64_t, double, bool, double, float*,
    float*, float*, float*, float*, cudaStream_t);
template void weighted_dpo<double>(
    const double*, const double*, const double*, const double*, const double*, int64_t, double, bool, double, double*,
    double*, double*, double*, double*, cudaStream_t);

}  // namespace ldalign_cuda
