// The elementwise parts of a transformer block: RMS norm (also of a sum), rotary embedding, SwiGLU. Each reads its
// inputs once, keeps nothing between forward and backward but one scale a row, and shares its rows among threads.
#include <algorithm>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include "check.h"
#include "ops.h"

namespace ldalign::cpu {
namespace {

constexpr int64_t kGrain = 32768;  // values a thread should have at least: fewer take less time than waking it

int64_t grain(int64_t values_per_row) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, values_per_row)); }

Tensor contiguous_wide(const Tensor& x, at::ScalarType dtype) { return x.to(wide(dtype)).contiguous(); }

void norm(const Tensor& x, const Tensor* residual, const Tensor& weight, double eps, const Tensor& y,
          const Tensor* total, const Tensor& rstd) {
  const int64_t N = x.size(0), D = x.size(1);
  const Tensor w = contiguous_wide(weight, x.scalar_type());
  with_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using A = Wide<T>;
    const auto& kernel = kernels<T>().rms_norm;
    at::parallel_for(0, N, grain(D), [&](int64_t begin, int64_t end) {
      const int64_t at = begin * D;
      kernel(data<T>(x) + at, residual ? data<T>(*residual) + at : nullptr, data<A>(w), static_cast<A>(eps),
             end - begin, D, data<T>(y) + at, total ? data<T>(*total) + at : nullptr, data<A>(rstd) + begin);
    });
  });
}

// The weight's gradient is summed over blocks of rows whose size depends on N alone, then over the blocks in order: the
// same bits for any number of threads.
std::tuple<Tensor, Tensor> norm_backward(
    const Tensor& dy, const Tensor* dtotal, const Tensor& x, const Tensor& weight, const Tensor& rstd) {
  constexpr int64_t kBlocks = 128;  // at most
  const int64_t N = x.size(0), D = x.size(1);
  const int64_t rows = std::max<int64_t>(32, (N + kBlocks - 1) / kBlocks);
  const int64_t blocks = (N + rows - 1) / rows;
  const Tensor w = contiguous_wide(weight, x.scalar_type());
  const Tensor dx = at::empty_like(x);
  const Tensor partial = at::zeros({std::max<int64_t>(1, blocks), D}, w.options());
  with_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using A = Wide<T>;
    const auto& kernel = kernels<T>().rms_norm_backward;
    at::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block) {
        const int64_t begin = block * rows, end = std::min(N, begin + rows), at = begin * D;
        kernel(data<T>(dy) + at, dtotal ? data<T>(*dtotal) + at : nullptr, data<T>(x) + at, data<A>(w),
               data<A>(rstd) + begin, end - begin, D, data<T>(dx) + at, data<A>(partial) + block * D);
      }
    });
    A* sum = data<A>(partial);
    for (int64_t block = 1; block < blocks; ++block) {
      for (int64_t i = 0; i < D; ++i) sum[i] += sum[block * D + i];
    }
  });
  return {dx, partial.select(0, 0).to(weight.scalar_type())};
}

void check_norm(const Check& check, const Tensor& x, const Tensor& weight) {
  check.floats(x, "x", 2, "(N, D)");
  check.floats(weight, "weight", 1, "(D,)");
  check.shape(weight, "weight", {x.size(1)}, "(D,)");
}

void check_norm_backward(
    const Check& check, const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& rstd) {
  check_norm(check, x, weight);
  check.like(dy, "dy", x, "x");
  check.shape(rstd, "rstd", {x.size(0)}, "(N,)");
  check.dtype(rstd, "rstd", wide(x.scalar_type()));
}

}  // namespace

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  check_norm({"rms_norm"}, x, weight);
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  const Tensor input = x.contiguous(), y = at::empty_like(input);
  const Tensor rstd = at::empty({x.size(0)}, x.options().dtype(wide(x.scalar_type())));
  norm(input, nullptr, weight, eps, y, nullptr, rstd);
  return {y, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& rstd) {
  check_norm_backward({"rms_norm_backward"}, dy, x, weight, rstd);
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  return norm_backward(dy.contiguous(), nullptr, x.contiguous(), weight, rstd.contiguous());
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm(
    const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  const Check check{"add_rms_norm"};
  check_norm(check, x, weight);
  check.like(residual, "residual", x, "x");
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  const Tensor input = x.contiguous(), other = residual.contiguous();
  const Tensor y = at::empty_like(input), total = at::empty_like(input);
  const Tensor rstd = at::empty({x.size(0)}, x.options().dtype(wide(x.scalar_type())));
  norm(input, &other, weight, eps, y, &total, rstd);
  return {y, total, rstd};
}

std::tuple<Tensor, Tensor> add_rms_norm_backward(
    const Tensor& dy, const Tensor& dtotal, const Tensor& total, const Tensor& weight, const Tensor& rstd) {
  const Check check{"add_rms_norm_backward"};
  check_norm_backward(check, dy, total, weight, rstd);
  check.like(dtotal, "dtotal", total, "total");
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  const Tensor other = dtotal.contiguous();
  return norm_backward(dy.contiguous(), &other, total.contiguous(), weight, rstd.contiguous());
}

void rope_(Tensor x, const Tensor& cos, const Tensor& sin, bool inverse, int64_t turned) {
  const Check check{"rope_"};
  check.floats(x, "x", 3, "(N, H, E)");
  const int64_t N = x.size(0), H = x.size(1), E = x.size(2);
  TORCH_CHECK_VALUE(E % 2 == 0, "rope_: x has head width ", E, ", expected an even one");
  TORCH_CHECK_VALUE(0 <= turned && turned <= H, "rope_: heads is ", turned, ", expected 0 to ", H);
  check.floats(cos, "cos", 2, "(N, E/2)");
  check.floats(sin, "sin", 2, "(N, E/2)");
  check.shape(cos, "cos", {N, E / 2}, "(N, E/2)");
  check.shape(sin, "sin", {N, E / 2}, "(N, E/2)");
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  // A row's heads lie side by side; rows may be any distance apart.
  const bool dense = x.stride(2) == 1 && x.stride(1) == E;
  const Tensor rows = dense ? x : x.contiguous();
  const Tensor c = contiguous_wide(cos, x.scalar_type()), s = contiguous_wide(sin, x.scalar_type());
  with_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using A = Wide<T>;
    const auto& kernel = kernels<T>().rope;
    const int64_t stride = rows.stride(0);
    at::parallel_for(0, N, grain(turned * E), [&](int64_t begin, int64_t end) {
      T* first = data<T>(rows) + begin * stride;
      kernel(first, stride, data<A>(c) + begin * (E / 2), data<A>(s) + begin * (E / 2), inverse ? -1 : 1, end - begin,
             turned, E, first, stride);
    });
  });
  if (!dense) x.copy_(rows);
}

namespace {

// gate_up as rows: (rows, 2 D) with any distance between rows.
Tensor swiglu_rows(const Check& check, const Tensor& gate_up) {
  check.floats(gate_up, "gate_up", std::max<int64_t>(1, gate_up.dim()), "(..., 2 D)");
  TORCH_CHECK_VALUE(gate_up.size(-1) % 2 == 0, check.op, ": gate_up has width ", gate_up.size(-1),
                    ", expected an even one: gates, then ups");
  if (gate_up.dim() == 2 && gate_up.stride(1) == 1) return gate_up;
  const int64_t width = gate_up.size(-1);
  return gate_up.contiguous().view({width ? gate_up.numel() / width : 0, width});
}

std::vector<int64_t> halved(const Tensor& gate_up) {
  std::vector<int64_t> sizes = gate_up.sizes().vec();
  sizes.back() /= 2;
  return sizes;
}

}  // namespace

Tensor swiglu(const Tensor& gate_up) {
  const Tensor rows = swiglu_rows({"swiglu"}, gate_up);
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  const Tensor y = at::empty(halved(gate_up), gate_up.options());
  const int64_t D = rows.size(1) / 2, stride = rows.stride(0);
  with_type(rows.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto& kernel = kernels<T>().swiglu;
    at::parallel_for(0, rows.size(0), grain(D), [&](int64_t begin, int64_t end) {
      kernel(data<T>(rows) + begin * stride, end - begin, stride, D, data<T>(y) + begin * D);
    });
  });
  return y;
}

Tensor swiglu_backward(const Tensor& dy, const Tensor& gate_up) {
  const Check check{"swiglu_backward"};
  const Tensor rows = swiglu_rows(check, gate_up);
  check.shape(dy, "dy", halved(gate_up), "half of gate_up's width");
  check.dtype(dy, "dy", gate_up.scalar_type());
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  const Tensor grad = dy.contiguous(), out = at::empty(gate_up.sizes(), gate_up.options());
  const int64_t D = rows.size(1) / 2, stride = rows.stride(0);
  with_type(rows.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto& kernel = kernels<T>().swiglu_backward;
    at::parallel_for(0, rows.size(0), grain(D), [&](int64_t begin, int64_t end) {
      kernel(data<T>(grad) + begin * D, data<T>(rows) + begin * stride, end - begin, stride, D,
             data<T>(out) + begin * 2 * D);
    });
  });
  return out;
}

}  // namespace ldalign::cpu
