// The operations as C++ functions; module.cpp registers them with torch as torch.ops.ldalign_cpp.*.
//
// No autograd here: forward and backward are separate functions, joined in ldalign/ops.py. Shapes: N rows (flat
// tokens), D width, V vocabulary, S responses, P pairs, H heads, E head width. A gradient not asked for is undefined,
// None in Python. workspace_bytes: the most bytes of logits held at once.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>

#include <ATen/core/Tensor.h>

namespace ldalign::cpu {

using at::Tensor;

// ---- head.cpp

// -> logp (N,), lse (N,)
std::tuple<Tensor, Tensor> linear_logprob(
    const Tensor& hidden, const Tensor& weight, const Tensor& target, int64_t ignore_index, int64_t workspace_bytes);

// grad (N,) -> dhidden (N, D), dweight (V, D). Ignored rows come with grad 0; only they may have any target.
std::tuple<Tensor, Tensor> linear_logprob_backward(
    const Tensor& grad, const Tensor& hidden, const Tensor& weight, const Tensor& target, const Tensor& lse,
    bool need_hidden, bool need_weight, int64_t workspace_bytes);

// lengths (S,), reference (S,), pair_weight (P,) -> sums (S,), dhidden, dweight. The last four: kernels/loss_options.py
std::tuple<Tensor, Tensor, Tensor> pair_loss(
    const Tensor& hidden, const Tensor& weight, const Tensor& target, at::IntArrayRef lengths, const Tensor& reference,
    const Tensor& pair_weight, double beta, double scale, bool need_hidden, bool need_weight, int64_t workspace_bytes,
    bool ipo, double nll, double label_smoothing, bool length_normalised);

// -> logp (N,), dhidden, dweight
std::tuple<Tensor, Tensor, Tensor> sft_loss(
    const Tensor& hidden, const Tensor& weight, const Tensor& target, double scale, bool need_hidden, bool need_weight,
    int64_t workspace_bytes);

// five times (P,) -> loss (), unweighted loss, chosen and rejected rewards, d loss / d sums_real: (P,) each
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> weighted_dpo(
    const Tensor& sums_real, const Tensor& sums_generated, const Tensor& ref_real, const Tensor& ref_generated,
    const Tensor& weight, double beta, bool ipo, double label_smoothing);

// ---- block.cpp

// x (N, D), weight (D,) -> y (N, D), rstd (N,)
std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps);

// dy (N, D) -> dx (N, D), dweight (D,)
std::tuple<Tensor, Tensor> rms_norm_backward(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& rstd);

// x, residual (N, D) -> y, total (N, D), rstd (N,)
std::tuple<Tensor, Tensor, Tensor> add_rms_norm(
    const Tensor& x, const Tensor& residual, const Tensor& weight, double eps);

// dy, dtotal (N, D) -> dx (N, D), dweight (D,)
std::tuple<Tensor, Tensor> add_rms_norm_backward(
    const Tensor& dy, const Tensor& dtotal, const Tensor& total, const Tensor& weight, const Tensor& rstd);

// x (N, H, E), cos and sin (N, E/2): the first `turned` heads turn, in place
void rope_(Tensor x, const Tensor& cos, const Tensor& sin, bool inverse, int64_t turned);

// gate_up (..., 2 D) -> (..., D)
Tensor swiglu(const Tensor& gate_up);

// dy (..., D) -> (..., 2 D)
Tensor swiglu_backward(const Tensor& dy, const Tensor& gate_up);

// ---- attention.cpp: K key/value heads; segments (S, 4) int64: begin, end, prefix_begin, prefix_end

// qkv (N, H + 2K, E) -> out (N, H, E), lse (N, H)
std::tuple<Tensor, Tensor> pair_attention(
    const Tensor& qkv, int64_t heads, const Tensor& segments, std::optional<int64_t> window);

// grad (N, H, E) -> dqkv (N, H + 2K, E)
Tensor pair_attention_backward(
    const Tensor& grad, const Tensor& qkv, const Tensor& out, const Tensor& lse, int64_t heads, const Tensor& segments,
    std::optional<int64_t> window);

// ---- optimizer.cpp: in place; m and v float32 or bfloat16

// AdamW's step number `step`, from 1
void adamw_(Tensor p, const Tensor& grad, Tensor m, Tensor v, double learning_rate, double decay, double beta1,
            double beta2, double eps, int64_t step, int64_t seed);
void rmsprop_(Tensor p, const Tensor& grad, Tensor v, double learning_rate, double decay, double alpha, double eps,
              int64_t seed);

// ---- decode.cpp: weights packed in panels of 32 rows, (panels, K, 32); float32 or bfloat16

// x (N, K) -> (N, out_features), float32 with wide_out. With scales (panels, groups, 32) packed is int8, and so is x to
// the product (int8_product.h).
Tensor packed_linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& scales, int64_t out_features,
                     bool wide_out);
// rows ids (N,) of a packed weight, as they were before -> (N, K)
Tensor packed_rows(const Tensor& packed, const Tensor& ids);
// x (N, K) -> q (N, K to whole groups of 64) int8 and scales (N, groups) float32: `quantise` of kernels.h
std::tuple<Tensor, Tensor> quantise(const Tensor& x);

// x (N, D): the new tokens of R rows, row after row; rows (R, 2): how many, and how many the cache holds; pages (R, P):
// the row's pages, in order. weights: qkv, o, gate_up and down of each layer; scales: theirs, where they are int8, else
// none; norms: two of each, and the last, float32.
// keys (L, pages, K, E, 16), values (L, pages, K, 16, E'): the new tokens' are added. -> normed hidden (N, D)
Tensor decode_layers(
    const Tensor& x, at::TensorList weights, at::TensorList scales, at::TensorList norms, const Tensor& keys, const Tensor& values,
    const Tensor& rows, const Tensor& pages, const Tensor& cos, const Tensor& sin, int64_t heads,
    int64_t intermediate, std::optional<int64_t> window, double eps);

// ---- sample.cpp

// x (R, V) float32 -> (R,) bool: whether all of a row is finite
Tensor all_finite(const Tensor& x);

// logits (R, V) float32, overwritten; uniform (R,) float64; seen (R, T): tokens to penalise, -1 for none
// -> ids (R,), log-probs (R,)
std::tuple<Tensor, Tensor> sample(
    const Tensor& logits, const Tensor& uniform, double temperature, int64_t top_k, double top_p, double min_p,
    double penalty, const Tensor& seen);

}  // namespace ldalign::cpu
