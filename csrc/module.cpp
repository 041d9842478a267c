// Registers the operations with torch, as torch.ops.ldalign_cpp.*; importing ldalign._C does nothing but load them.
#include <Python.h>

#include <torch/library.h>

#include "isa.h"
#include "ops.h"

namespace ldalign::cpu {
namespace {

std::string compiler() {
#ifdef __clang__
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

bool threads() {
#ifdef _OPENMP
  return true;
#else
  return false;
#endif
}

}  // namespace

TORCH_LIBRARY(ldalign_cpp, m) {
  m.def("linear_logprob(Tensor hidden, Tensor weight, Tensor target, int ignore_index, int workspace_bytes)"
        " -> (Tensor logp, Tensor lse)");
  m.def("linear_logprob_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor target, Tensor lse,"
        " bool need_hidden, bool need_weight, int workspace_bytes) -> (Tensor dhidden, Tensor dweight)");
  m.def("pair_loss(Tensor hidden, Tensor weight, Tensor target, int[] lengths, Tensor reference, Tensor pair_weight,"
        " float beta, float scale, bool need_hidden, bool need_weight, int workspace_bytes, bool ipo, float nll,"
        " float label_smoothing, bool length_normalised)"
        " -> (Tensor sums, Tensor dhidden, Tensor dweight)");
  m.def("sft_loss(Tensor hidden, Tensor weight, Tensor target, float scale, bool need_hidden, bool need_weight,"
        " int workspace_bytes) -> (Tensor logp, Tensor dhidden, Tensor dweight)");
  m.def("weighted_dpo(Tensor sums_real, Tensor sums_generated, Tensor ref_real, Tensor ref_generated, Tensor weight,"
        " float beta, bool ipo, float label_smoothing)"
        " -> (Tensor loss, Tensor unweighted, Tensor chosen, Tensor rejected, Tensor coefficient)");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor rstd)");
  m.def("rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd) -> (Tensor dx, Tensor dweight)");
  m.def("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor y, Tensor total, Tensor rstd)");
  m.def("add_rms_norm_backward(Tensor dy, Tensor dtotal, Tensor total, Tensor weight, Tensor rstd)"
        " -> (Tensor dx, Tensor dweight)");
  m.def("rope_(Tensor(a!) x, Tensor cos, Tensor sin, bool inverse, int heads) -> ()");
  m.def("swiglu(Tensor gate_up) -> Tensor");
  m.def("swiglu_backward(Tensor dy, Tensor gate_up) -> Tensor");
  m.def("pair_attention(Tensor qkv, int heads, Tensor segments, int? window) -> (Tensor out, Tensor lse)");
  m.def("pair_attention_backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse, int heads, Tensor segments,"
        " int? window) -> Tensor");
  m.def("adamw_(Tensor(a!) p, Tensor grad, Tensor(b!) m, Tensor(c!) v, float learning_rate, float decay, float beta1,"
        " float beta2, float eps, int step, int seed) -> ()");
  m.def("rmsprop_(Tensor(a!) p, Tensor grad, Tensor(b!) v, float learning_rate, float decay, float alpha, float eps,"
        " int seed) -> ()");
  m.def("packed_linear(Tensor x, Tensor packed, Tensor? scales, int out_features, bool wide_out) -> Tensor");
  m.def("packed_rows(Tensor packed, Tensor ids) -> Tensor");
  m.def("quantise(Tensor x) -> (Tensor q, Tensor scales)");
  m.def("decode_layers(Tensor x, Tensor[] weights, Tensor[] scales, Tensor[] norms, Tensor(a!) keys, Tensor(b!) values,"
        " Tensor rows, Tensor pages, Tensor cos, Tensor sin, int heads, int intermediate, int? window, float eps)"
        " -> Tensor");
  m.def("all_finite(Tensor x) -> Tensor");
  m.def("sample(Tensor(a!) logits, Tensor uniform, float temperature, int top_k, float top_p, float min_p,"
        " float penalty, Tensor seen) -> (Tensor ids, Tensor logp)");

  m.def("isa() -> str", &isa);
  m.def("isas() -> str[]", &isas);
  m.def("set_isa(str name) -> ()", [](std::string name) { set_isa(name); });
  m.def("compiler() -> str", &compiler);
  m.def("threads() -> bool", &threads);
}

TORCH_LIBRARY_IMPL(ldalign_cpp, CPU, m) {
  m.impl("linear_logprob", TORCH_FN(linear_logprob));
  m.impl("linear_logprob_backward", TORCH_FN(linear_logprob_backward));
  m.impl("pair_loss", TORCH_FN(pair_loss));
  m.impl("sft_loss", TORCH_FN(sft_loss));
  m.impl("weighted_dpo", TORCH_FN(weighted_dpo));
  m.impl("rms_norm", TORCH_FN(rms_norm));
  m.impl("rms_norm_backward", TORCH_FN(rms_norm_backward));
  m.impl("add_rms_norm", TORCH_FN(add_rms_norm));
  m.impl("add_rms_norm_backward", TORCH_FN(add_rms_norm_backward));
  m.impl("rope_", TORCH_FN(rope_));
  m.impl("swiglu", TORCH_FN(swiglu));
  m.impl("swiglu_backward", TORCH_FN(swiglu_backward));
  m.impl("pair_attention", TORCH_FN(pair_attention));
  m.impl("pair_attention_backward", TORCH_FN(pair_attention_backward));
  m.impl("adamw_", TORCH_FN(adamw_));
  m.impl("rmsprop_", TORCH_FN(rmsprop_));
  m.impl("packed_linear", TORCH_FN(packed_linear));
  m.impl("packed_rows", TORCH_FN(packed_rows));
  m.impl("quantise", TORCH_FN(quantise));
  m.impl("decode_layers", TORCH_FN(decode_layers));
  m.impl("all_finite", TORCH_FN(all_finite));
  m.impl("sample", TORCH_FN(sample));
}

}  // namespace ldalign::cpu

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1};
  return PyModule_Create(&definition);
}
