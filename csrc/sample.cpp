// The choice of the next tokens: penalty, temperature, cuts, and the inverse of the cumulative distribution.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>

#include "check.h"
#include "ops.h"
#include "team.h"

namespace ldalign::cpu {
namespace {

constexpr int64_t kBlock = 256;  // tokens whose probabilities are summed in float; the blocks' sums are added in double
constexpr float kNever = -std::numeric_limits<float>::infinity();

struct Choice {
  float inverse_temperature;  // 0: greedy
  int64_t top_k;              // 0: off
  double top_p, min_p;
  float penalty;
};

double block_sum(const float* p, int64_t n) {
  constexpr int kChains = 16;  // the compiler makes vectors of them
  float sums[kChains] = {};
  int64_t i = 0;
  for (; i + kChains <= n; i += kChains) {
    for (int k = 0; k < kChains; ++k) sums[k] += p[i + k];
  }
  for (; i < n; ++i) sums[i % kChains] += p[i];
  return std::accumulate(sums, sums + kChains, 0.0);
}

void keep_largest(float* z, int64_t V, int64_t k) {
  static thread_local std::vector<float> copy;
  copy.assign(z, z + V);
  std::nth_element(copy.begin(), copy.begin() + k - 1, copy.end(), std::greater<float>());
  const float least = copy[k - 1];
  for (int64_t i = 0; i < V; ++i) z[i] = z[i] < least ? kNever : z[i];
}

// Keeps the most likely tokens while the mass before them is below top_p: always the first. Of equals the lower id.
void keep_mass(float* p, int64_t V, double top_p) {
  static thread_local std::vector<int32_t> order;
  order.clear();
  for (int64_t i = 0; i < V; ++i) {
    if (p[i] > 0) order.push_back(static_cast<int32_t>(i));
  }
  const auto before = [&](int32_t a, int32_t b) { return p[a] > p[b] || (p[a] == p[b] && a < b); };
  double mass = 0;
  size_t sorted = 0, kept = order.size();
  for (size_t wanted = 64; sorted < order.size() && kept == order.size(); wanted *= 8) {
    const size_t end = std::min(order.size(), sorted + wanted);  // mostly a few tokens do: no need to sort the rest
    if (end < order.size()) {
      std::nth_element(order.begin() + sorted, order.begin() + end, order.end(), before);
    }
    std::sort(order.begin() + sorted, order.begin() + end, before);
    for (; sorted < end; ++sorted) {
      if (mass >= top_p) {
        kept = sorted;
        break;
      }
      mass += p[order[sorted]];
    }
  }
  for (size_t i = kept; i < order.size(); ++i) p[order[i]] = 0;
}

// The token at which the cumulative distribution passes `uniform` of its whole, and its log-prob.
std::pair<int64_t, float> invert(const float* p, int64_t V, double uniform) {
  static thread_local std::vector<double> sums;
  sums.clear();
  for (int64_t start = 0; start < V; start += kBlock) sums.push_back(block_sum(p + start, std::min(kBlock, V - start)));
  const double all = std::accumulate(sums.begin(), sums.end(), 0.0), wanted = uniform * all;
  double before = 0;
  size_t block = 0;
  while (block + 1 < sums.size() && before + sums[block] <= wanted) before += sums[block++];
  const int64_t start = static_cast<int64_t>(block) * kBlock, end = std::min(V, start + kBlock);
  int64_t chosen = -1;
  for (int64_t i = start; i < end; ++i) {
    if (p[i] <= 0) continue;
    chosen = i;  // within rounding of the block's end nothing may pass: then the last that can be
    before += p[i];
    if (before > wanted) break;
  }
  if (chosen < 0) chosen = std::max_element(p, p + V) - p;  // an empty last block: as rare
  return {chosen, static_cast<float>(std::log(p[chosen] / all))};
}

std::pair<int64_t, float> choose(float* z, int64_t V, double uniform, const Choice& choice) {
  if (choice.inverse_temperature == 0) {
    const int64_t best = std::max_element(z, z + V) - z;
    float logp, lse;
    kernels<float>().logprob(z, 1, V, &best, -1, &logp, &lse);
    return {best, logp};
  }
  if (choice.top_k > 0 && choice.top_k < V) keep_largest(z, V, choice.top_k);
  float lse;
  kernels<float>().attention_softmax(z, 1, V, 1, V, V, choice.inverse_temperature, &lse);
  if (choice.top_p < 1) keep_mass(z, V, choice.top_p);
  if (choice.min_p > 0) {
    const double least = choice.min_p * *std::max_element(z, z + V);
    for (int64_t i = 0; i < V; ++i) z[i] = z[i] < least ? 0 : z[i];
  }
  return invert(z, V, uniform);
}

// Whether no exponent is the one of infinities and NaN.
bool finite(const float* x, int64_t n) {
  constexpr uint32_t kSpecial = 0x7F800000u;
  uint32_t found = 0;  // no early end: without one the compiler makes vectors of it
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    __builtin_memcpy(&bits, x + i, sizeof bits);
    found |= (bits & kSpecial) == kSpecial;
  }
  return !found;
}

}  // namespace

Tensor all_finite(const Tensor& x) {
  const Check check{"all_finite"};
  check.floats(x, "x", 2, "(R, V)");
  check.dtype(x, "x", at::kFloat);
  const int64_t R = x.size(0), V = x.size(1);
  const Tensor from = x.contiguous(), sound = at::empty({R}, x.options().dtype(at::kBool));
  together(1, [&](Member& member) {
    member.by_turns(R, [&](int64_t r) { data<bool>(sound)[r] = finite(data<float>(from) + r * V, V); });
  });
  return sound;
}

std::tuple<Tensor, Tensor> sample(
    const Tensor& logits, const Tensor& uniform, double temperature, int64_t top_k, double top_p, double min_p,
    double penalty, const Tensor& seen) {
  const Check check{"sample"};
  check.floats(logits, "logits", 2, "(R, V)");
  check.dtype(logits, "logits", at::kFloat);
  const int64_t R = logits.size(0), V = logits.size(1);
  TORCH_CHECK_VALUE(logits.is_contiguous() && V > 0, check.op, ": logits must be contiguous and not empty");
  check.shape(uniform, "uniform", {R}, "(R,)");
  check.dtype(uniform, "uniform", at::kDouble);
  check.dtype(seen, "seen", at::kLong);
  TORCH_CHECK_VALUE(penalty == 1 || (seen.dim() == 2 && seen.size(0) == R), check.op, ": seen has shape ", seen.sizes(),
                    ", expected (R, T)");
  TORCH_CHECK_VALUE(temperature >= 0 && top_k >= 0 && top_p > 0 && min_p >= 0 && min_p <= 1 && penalty > 0, check.op,
                    ": temperature ", temperature, ", top_k ", top_k, ", top_p ", top_p, ", min_p ", min_p,
                    ", repetition penalty ", penalty);
  const Choice choice{temperature > 0 ? static_cast<float>(1 / temperature) : 0, top_k, top_p, min_p,
                      static_cast<float>(penalty)};
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  const Tensor ids = at::empty({R}, logits.options().dtype(at::kLong)), logp = at::empty({R}, logits.options());
  const Tensor draws = uniform.contiguous(), history = seen.contiguous();
  const int64_t T = penalty == 1 ? 0 : history.size(1);
  together(1, [&](Member& member) {
    std::vector<int64_t> tokens;
    member.by_turns(R, [&](int64_t r) {
      float* z = data<float>(logits) + r * V;
      const int64_t* own = data<int64_t>(history) + r * T;
      tokens.assign(own, own + T);
      std::sort(tokens.begin(), tokens.end());
      tokens.erase(std::unique(tokens.begin(), tokens.end()), tokens.end());
      for (const int64_t token : tokens) {
        if (token < 0 || token >= V) continue;  // -1 fills up the row
        z[token] = z[token] < 0 ? z[token] * choice.penalty : z[token] / choice.penalty;
      }
      std::tie(data<int64_t>(ids)[r], data<float>(logp)[r]) = choose(z, V, data<double>(draws)[r], choice);
    });
  });
  return {ids, logp};
}

}  // namespace ldalign::cpu
