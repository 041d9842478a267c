// csrc/cuda as one library of ops for CPU tensors: the same kernels and the same host code, with the headers here in
// CUDA's place. tests/kernels/test_cuda.py builds it.

#include "../../../csrc/cuda/bindings.cpp"
#include "../../../csrc/cuda/linear_logprob.cu"
#include "../../../csrc/cuda/weighted_dpo.cu"

namespace {

// The one product that torch has on CUDA only: half precision in, float32 out.
at::Tensor& mm_to_wide(const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype, at::Tensor& out) {
    return out.copy_(at::mm(a.to(dtype), b.to(dtype)));
}

}  // namespace

TORCH_LIBRARY_IMPL(ldalign_cuda, CPU, m) { ldalign_cuda::implement(m); }
TORCH_LIBRARY_IMPL(aten, CPU, m) { m.impl("mm.dtype_out", &mm_to_wide); }
