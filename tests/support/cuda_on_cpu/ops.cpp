// csrc/cuda as one library of ops for CPU tensors: the same kernels and the same host code, with the headers here in
// CUDA's place. tests/kernels/test_cuda.py builds it.

#include <ATen/ATen.h>

namespace at {

// Half precision is multiplied two columns at a time by some libraries (oneDNN's bfloat16 product with AMX): what stands
// behind an odd last column is read and multiplied by 0. Every product here does, so that a NaN there shows.
template <typename... Dtype>
Tensor& mm_out_by_twos(Tensor& out, const Tensor& a, const Tensor& b, Dtype... dtype) {
    const int64_t columns = a.size(1);
    if (columns % 2 == 0 || a.stride(1) != 1 || a.stride(0) <= columns) return mm_out(out, a, b, dtype...);
    const Tensor wider = a.as_strided({a.size(0), columns + 1}, a.strides(), a.storage_offset());
    return mm_out(out, wider, cat({b, zeros({1, b.size(1)}, b.options())}), dtype...);
}

}  // namespace at

#define mm_out mm_out_by_twos
#include "../../../csrc/cuda/bindings.cpp"
#undef mm_out
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
