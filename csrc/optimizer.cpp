// One step of AdamW or RMSprop over one parameter: one read and one write of everything.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include "check.h"
#include "ops.h"

namespace ldalign::cpu {
namespace {

constexpr int64_t kGrain = 32768;

// work(type of the weights, kernels, first value, end) on every thread's share.
template <class Work>
void each_share(const Check& check, const Tensor& p, const Tensor& grad, at::TensorList states, const Work& work) {
  TORCH_CHECK_VALUE(p.device().is_cpu() && p.is_contiguous() && (p.scalar_type() == at::kFloat || p.scalar_type() == at::kBFloat16),
                    check.op, ": p is a ", p.scalar_type(), " on ", p.device(), ", expected a dense float32 or bfloat16 one on the cpu");
  check.like(grad, "grad", p, "p");
  TORCH_CHECK_VALUE(grad.is_contiguous(), check.op, ": grad is not contiguous");
  for (const Tensor& state : states) {
    check.shape(state, "state", p.sizes(), "that of p");
    const auto dtype = state.scalar_type();
    TORCH_CHECK_VALUE(state.is_contiguous() && dtype == states[0].scalar_type() && (dtype == at::kFloat || dtype == at::kBFloat16),
                      check.op, ": state is ", dtype, ", expected dense float32 or bfloat16, all alike");
  }
  const auto run = [&](auto type) {
    at::parallel_for(0, p.numel(), kGrain, [&](int64_t begin, int64_t end) { work(type, begin, end); });
  };
  if (p.scalar_type() == at::kFloat) run(float{});
  else run(bf16{});
}

char* at_index(const Tensor& state, int64_t index) { return data<char>(state) + index * state.element_size(); }

}  // namespace

void adamw_(Tensor p, const Tensor& grad, Tensor m, Tensor v, double learning_rate, double decay, double beta1,
            double beta2, double eps, int64_t step, int64_t seed) {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  const Update update{float(learning_rate), float(decay), float(beta1), float(beta2), float(eps),
                      float(1 - std::pow(beta1, step)), float(1 - std::pow(beta2, step)), uint32_t(seed)};
  const bool narrow = m.scalar_type() == at::kBFloat16;
  each_share({"adamw_"}, p, grad, {m, v}, [&](auto type, int64_t begin, int64_t end) {
    using T = decltype(type);
    kernels<T>().adamw(data<T>(p) + begin, data<T>(grad) + begin, at_index(m, begin), at_index(v, begin), narrow,
                       end - begin, begin, update);
  });
}

void rmsprop_(Tensor p, const Tensor& grad, Tensor v, double learning_rate, double decay, double alpha, double eps,
              int64_t seed) {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  const Update update{float(learning_rate), float(decay), 0, float(alpha), float(eps), 1, 1, uint32_t(seed)};
  const bool narrow = v.scalar_type() == at::kBFloat16;
  each_share({"rmsprop_"}, p, grad, {v}, [&](auto type, int64_t begin, int64_t end) {
    using T = decltype(type);
    kernels<T>().rmsprop(data<T>(p) + begin, data<T>(grad) + begin, at_index(v, begin), narrow, end - begin, begin,
                         update);
  });
}

}  // namespace ldalign::cpu
