// What both families of kernels share: launching, sums over a block, the DPO term.
#pragma once

#undef NDEBUG  // a target out of range must stop a release build's kernel too
#include <cassert>

#include "kernels.h"

namespace ldalign_cuda {

constexpr int kThreads = 256;  // a block; three should fit a multiprocessor, so at most 80 registers a thread
constexpr int kWarp = 32;

#ifdef __CUDACC__
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, cudaStream_t stream, Arguments... arguments) {
    kernel<<<grid, kThreads, 0, stream>>>(arguments...);
}
#endif  // without nvcc, tests/support/cuda_on_cpu/cuda_runtime.h has a launch() that runs the kernel on the CPU

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Between stored and wide numbers. By name, as torch's builder turns CUDA's own conversions of half precision off.
__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

// Rounded to the nearest.
template <typename T>
__device__ T narrow(Wide<T> x) {
    return x;
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
    return __float2bfloat16(x);
}
template <>
__device__ inline __half narrow<__half>(float x) {
    return __float2half(x);
}

// The sum over a warp, in all its lanes. Always the same order, so always the same bits.
template <typename W>
__device__ W warp_sum(W value) {
    for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffff, value, offset);
    return value;
}

// The sum over a block, in thread 0's warp. Every thread must call it; calls may follow each other.
template <typename W>
__device__ W block_sum(W value) {
    __shared__ W of_warp[kThreads / kWarp];
    value = warp_sum(value);
    __syncthreads();  // the call before this one may still be reading
    if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
    __syncthreads();
    const int lane = threadIdx.x % kWarp;
    return warp_sum(lane < kThreads / kWarp ? of_warp[lane] : W(0));
}

// -log sigmoid(x) = log(1 + exp(-x)), with no overflow at either end.
template <typename W>
__device__ W minus_log_sigmoid(W x) {
    return (x < 0 ? -x : W(0)) + log1p(exp(-fabs(x)));
}

// sigmoid(-x) = exp(-x) / (1 + exp(-x)); a NaN stays one.
template <typename W>
__device__ W sigmoid_of_minus(W x) {
    const W e = exp(-fabs(x));
    return (x < 0 ? W(1) : e) / (1 + e);
}

// -dl/dx of a pair's loss l at x = beta Delta; a NaN stays one.
template <typename W>
__device__ W pull(W x, W beta, bool ipo, W smoothing) {
    return ipo ? (1 - 2 * x) / (beta * beta) : sigmoid_of_minus(x) - smoothing;
}

}  // namespace ldalign_cuda
