#pragma once
#include "cuda_runtime.h"
namespace c10::cuda {
struct NoStream {
    cudaStream_t stream() const { return nullptr; }
};
inline NoStream getCurrentCUDAStream() { return {}; }
}  // namespace c10::cuda
