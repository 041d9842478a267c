// The part of CUDA that csrc/cuda/*.cu use, as C++ for the CPU: what lets a machine with no GPU run those kernels.
//
// A block's threads are coroutines that run one after the other, each as far as its next barrier (__syncthreads or a
// shuffle, which every thread of a block must reach: one that returns early is an error). The order turns round at every
// barrier, so a missing one shows. Blocks run one after the other. Slow, and no model of memory or speed.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    explicit dim3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
using cudaStream_t = void*;

inline dim3 blockIdx(0), threadIdx(0);

using std::exp, std::fabs, std::log, std::log1p;
template <typename W>
W fmax(W a, W b) {
    return std::fmax(a, b);
}

namespace on_cpu {

constexpr int kBlock = 256, kStack = 32 * 1024;

struct Block {
    ucontext_t home, thread[kBlock];
    std::vector<char> stacks = std::vector<char>(kBlock * kStack);
    bool done[kBlock];
    int now = 0;
    double exchange[kBlock];
    std::function<void()> kernel;
};

inline Block& block() {
    static Block the_one;
    return the_one;
}

inline void barrier() {
    Block& b = block();
    swapcontext(&b.thread[b.now], &b.home);
}

inline void thread_main() {
    Block& b = block();
    b.kernel();
    b.done[b.now] = true;
    swapcontext(&b.thread[b.now], &b.home);
}

inline void run_block() {
    Block& b = block();
    for (int t = 0; t < kBlock; ++t) {
        getcontext(&b.thread[t]);
        b.thread[t].uc_stack.ss_sp = b.stacks.data() + t * kStack;
        b.thread[t].uc_stack.ss_size = kStack;
        b.thread[t].uc_link = nullptr;
        makecontext(&b.thread[t], thread_main, 0);
        b.done[t] = false;
    }
    for (int phase = 0, finished = 0; finished == 0; ++phase) {
        for (int i = 0; i < kBlock; ++i) {
            b.now = phase % 2 ? kBlock - 1 - i : i;
            threadIdx.x = static_cast<unsigned>(b.now);
            swapcontext(&b.home, &b.thread[b.now]);
        }
        for (int t = 0; t < kBlock; ++t) finished += b.done[t];
        if (finished != 0 && finished != kBlock) {
            std::fprintf(stderr, "cuda_on_cpu: %d of %d threads returned before a barrier\n", finished, kBlock);
            std::abort();
        }
    }
}

}  // namespace on_cpu

inline void __syncthreads() { on_cpu::barrier(); }

template <typename W>
W __shfl_xor_sync(unsigned, W value, int lanes) {
    on_cpu::Block& b = on_cpu::block();
    const int me = b.now;
    b.exchange[me] = value;
    on_cpu::barrier();
    const W other = static_cast<W>(b.exchange[me ^ lanes]);
    on_cpu::barrier();
    return other;
}

namespace ldalign_cuda {

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, cudaStream_t, Arguments... arguments) {
    on_cpu::block().kernel = [=] { kernel(arguments...); };
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
        for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) on_cpu::run_block();
}

}  // namespace ldalign_cuda
