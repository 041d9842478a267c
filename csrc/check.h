// Checks of arguments, worded for the person who passed them, and the step from a tensor's dtype to a C++ type.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include "kernels.h"

namespace ldalign::cpu {

using at::Tensor;

inline at::ScalarType wide(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

// f(T{}) with the storage type of dtype.
template <class F>
void with_type(at::ScalarType dtype, const F& f) {
  switch (dtype) {
    case at::kFloat: return f(float{});
    case at::kDouble: return f(double{});
    case at::kBFloat16: return f(bf16{});
    default: return f(half{});
  }
}

template <class T>
T* data(const Tensor& tensor) { return static_cast<T*>(tensor.data_ptr()); }

// Names the operation in every message.
struct Check {
  const char* op;

  // A float tensor on the CPU; `axes` is its shape in letters, "(N, D)".
  void floats(const Tensor& x, const char* name, int64_t dims, const char* axes) const {
    on_cpu(x, name);
    const auto dtype = x.scalar_type();
    TORCH_CHECK_VALUE(
        dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kDouble, op, ": ", name,
        " is ", dtype, ", expected float32, bfloat16, float16 or float64");
    TORCH_CHECK_VALUE(x.dim() == dims, op, ": ", name, " has shape ", x.sizes(), ", expected ", axes);
  }

  void shape(const Tensor& x, const char* name, at::IntArrayRef sizes, const char* axes) const {
    on_cpu(x, name);
    TORCH_CHECK_VALUE(x.sizes() == sizes, op, ": ", name, " has shape ", x.sizes(), ", expected ", axes, " = ", sizes);
  }

  void dtype(const Tensor& x, const char* name, at::ScalarType expected) const {
    TORCH_CHECK_VALUE(x.scalar_type() == expected, op, ": ", name, " is ", x.scalar_type(), ", expected ", expected);
  }

  // Shape and dtype of a tensor that must look like another.
  void like(const Tensor& x, const char* name, const Tensor& other, const char* other_name) const {
    on_cpu(x, name);
    TORCH_CHECK_VALUE(
        x.sizes() == other.sizes() && x.scalar_type() == other.scalar_type(), op, ": ", name, " is ", x.scalar_type(),
        " of shape ", x.sizes(), ", expected ", other.scalar_type(), " of shape ", other.sizes(), " like ", other_name);
  }

 private:
  void on_cpu(const Tensor& x, const char* name) const {
    TORCH_CHECK_VALUE(x.device().is_cpu(), op, ": ", name, " is on ", x.device(), ", expected cpu");
  }
};

}  // namespace ldalign::cpu
