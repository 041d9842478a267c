// The head: linear_logprob, pair_loss, sft_loss, and weighted_dpo.
//
// Rows go through in pieces whose logits fit the workspace. Of each piece: z = hidden weight^T (oneDNN), one pass of
// our own over z for the log-sum-exp and the target's log-prob, one pass that turns z in place into the gradient of
// the logits, then dhidden = z weight and dweight += z^T hidden (oneDNN). Three products, two passes, no (N, V) tensor.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "check.h"
#include "ops.h"

namespace ldalign::cpu {
namespace {

// A large tensor not yet written to. Its memory is new to the process, and the first touch of every 4 KiB page costs
// a fault, in all up to a tenth of the head's time; asked for pages of 2 MiB, Linux makes do with a few.
Tensor large_empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  Tensor tensor = at::empty(sizes, options);
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 4096;
  const uintptr_t start = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const uintptr_t begin = (start + kPage - 1) / kPage * kPage, end = (start + tensor.nbytes()) / kPage * kPage;
  if (end > begin && end - begin >= 4u << 20) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return tensor;
}

constexpr int64_t kNoneIgnored = std::numeric_limits<int64_t>::min();

struct Rows {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
  // oneDNN multiplies 573 rows a third slower than 576: rows of zeros are put behind those of a piece (not of a tiny one).
  int64_t padded() const { return size() < 64 ? size() : (size() + 7) / 8 * 8; }
};

// Sums z^T hidden over the pieces. Of a 16-bit dtype every addition rounds: a few pieces may (oneDNN adds inside the
// product; the tests bound the error by three times that of one product), many may not, and a float32 sum would take twice the
// gradient's size. So of many, 24 bits of the sum are kept: 16 in the gradient's own memory, 8 beside it. That is 1
// byte a weight, 16 significant bits, and one rounding at the end. There the product is made a tile of the vocabulary
// at a time, which stays in the cache until it has been added.
class WeightGradient {
 public:
  static constexpr int64_t kFew = 8;
  int64_t pieces = 0;  // how many there will be
  Tensor sum;          // (V, D); undefined if not wanted

  WeightGradient(const Tensor& weight, int64_t rows, bool wanted) : rows_(rows) {
    if (!wanted) return;
    sum = large_empty(weight.sizes(), weight.options());
    if (rows == 0) sum.zero_();
  }

  void add(const Tensor& z, const Tensor& hidden, Rows rows) {
    if (!sum.defined()) return;
    const bool first = rows.begin == 0, last = rows.end == rows_;
    const bool direct = sum.element_size() > 2 || pieces <= kFew;
    if (first && (last || direct)) {
      at::mm_out(sum, z.t(), hidden);
    } else if (direct) {
      at::addmm_out(sum, sum, z.t(), hidden);
    } else {
      add_tiles(z, hidden, first, last);
    }
  }

 private:
  void add_tiles(const Tensor& z, const Tensor& hidden, bool first, bool last) {
    constexpr int64_t kTileBytes = 2 << 20;
    const int64_t V = sum.size(0), D = sum.size(1);
    const int64_t fits = kTileBytes / std::max<int64_t>(1, D * sum.element_size());
    const int64_t tile = std::min(V, std::max<int64_t>(64, fits / 64 * 64));
    if (!low_.defined()) {
      low_ = large_empty({V, D}, sum.options().dtype(at::kByte));
      product_ = at::empty({tile, D}, sum.options());
    }
    for (int64_t start = 0; start < V; start += tile) {
      const int64_t n = std::min(tile, V - start);
      Tensor product = product_.narrow(0, 0, n);
      at::mm_out(product, z.narrow(1, start, n).t(), hidden);
      with_type(sum.scalar_type(), [&](auto type) {
        using T = decltype(type);
        const auto& kernel = kernels<T>().accumulate;
        at::parallel_for(0, n * D, 32768, [&](int64_t begin, int64_t end) {
          const int64_t at = start * D + begin;
          kernel(data<T>(product) + begin, end - begin, first, last, data<T>(sum) + at, data<uint8_t>(low_) + at);
        });
      });
    }
  }

  int64_t rows_;
  Tensor low_, product_;
};

// What all head operations share: the inputs, the workspace, and the steps of a piece.
struct Head {
  const int64_t N, V;
  const int64_t most;  // rows of a piece
  const Tensor hidden, weight, target;
  Tensor logp, lse;  // (N,) wide
  Tensor dhidden;    // (N, D); undefined if not wanted
  WeightGradient dweight;
  Tensor workspace;
  Tensor piece, buffer;  // the hidden rows of the piece at hand, and where they are padded

  Head(const Check& check, const Tensor& hidden_in, const Tensor& weight_in, const Tensor& target_in,
       int64_t workspace_bytes, bool need_hidden, bool need_weight)
      : N(check_shapes(check, hidden_in, weight_in, target_in, workspace_bytes)),
        V(weight_in.size(0)),
        most(most_rows(workspace_bytes / std::max<int64_t>(1, V * hidden_in.element_size()))),
        hidden(hidden_in.contiguous()),
        // A product takes a transposed weight as it is; other strides it would copy anew for every piece.
        weight(weight_in.stride(0) == 1 || weight_in.stride(1) == 1 ? weight_in : weight_in.contiguous()),
        target(target_in.contiguous()),
        dweight(weight, N, need_weight) {
    const auto wide_options = hidden.options().dtype(wide(hidden.scalar_type()));
    logp = at::empty({N}, wide_options);
    lse = at::empty({N}, wide_options);
    if (need_hidden) dhidden = at::empty_like(hidden);
    workspace = large_empty({std::min(most, Rows{0, N}.padded()), V}, hidden.options());
  }

  static int64_t most_rows(int64_t fit) { return fit < 64 ? std::max<int64_t>(1, fit) : fit / 8 * 8; }

  // All rows in pieces of about equal size.
  std::vector<Rows> pieces() const { return pieces({0, N}); }
  std::vector<Rows> pieces(Rows rows) const {
    std::vector<Rows> all;
    const int64_t count = (rows.size() + most - 1) / most;
    for (int64_t i = 0; i < count; ++i) {
      all.push_back({rows.begin + rows.size() * i / count, rows.begin + rows.size() * (i + 1) / count});
    }
    return all;
  }

  // The logits of a piece, padded; they stand until the next call.
  Tensor logits(Rows rows) {
    const int64_t padded = rows.padded();
    if (padded == rows.size()) {
      piece = hidden.narrow(0, rows.begin, padded);
    } else {
      if (!buffer.defined()) buffer = at::empty({most, hidden.size(1)}, hidden.options());
      piece = buffer.narrow(0, 0, padded);
      piece.narrow(0, 0, rows.size()).copy_(hidden.narrow(0, rows.begin, rows.size()));
      piece.narrow(0, rows.size(), padded - rows.size()).zero_();
    }
    Tensor z = workspace.narrow(0, 0, padded);
    at::mm_out(z, piece, weight.t());
    return z;
  }

  void logprob(const Tensor& z, Rows rows, int64_t ignored = kNoneIgnored) {
    with_type(hidden.scalar_type(), [&](auto type) {
      using T = decltype(type);
      using A = Wide<T>;
      const auto& kernel = kernels<T>().logprob;
      at::parallel_for(rows.begin, rows.end, 1, [&](int64_t begin, int64_t end) {
        kernel(data<T>(z) + (begin - rows.begin) * V, end - begin, V, data<int64_t>(target) + begin, ignored,
               data<A>(logp) + begin, data<A>(lse) + begin);
      });
    });
  }

  // Turns z into the logits' gradient and passes it on; scale (N,) is the gradient of every row's log-prob.
  void backward(const Tensor& z, Rows rows, const Tensor& scale) {
    if (!dhidden.defined() && !dweight.sum.defined()) return;
    with_type(hidden.scalar_type(), [&](auto type) {
      using T = decltype(type);
      using A = Wide<T>;
      const auto& kernel = kernels<T>().logit_gradient;
      at::parallel_for(rows.begin, rows.end, 1, [&](int64_t begin, int64_t end) {
        kernel(data<T>(z) + (begin - rows.begin) * V, end - begin, V, data<int64_t>(target) + begin,
               data<A>(lse) + begin, data<A>(scale) + begin);
      });
    });
    dweight.add(z, piece, rows);  // the padding's logits are zero, and so is their share
    if (dhidden.defined()) {
      Tensor out = dhidden.narrow(0, rows.begin, rows.size());
      if (z.size(0) == rows.size()) {
        at::mm_out(out, z, weight);
      } else {
        at::mm_out(piece, z, weight);
        out.copy_(piece.narrow(0, 0, rows.size()));
      }
    }
  }

  // Every target is an entry of the vocabulary, but for rows where excused(row).
  template <class Excused>
  void check_target(const Check& check, const Excused& excused) const {
    for (int64_t row = 0; row < N; ++row) {
      const int64_t id = data<int64_t>(target)[row];
      TORCH_CHECK_VALUE((0 <= id && id < V) || excused(row), check.op, ": target[", row, "] is ", id,
                        ", expected 0 to ", V - 1);
    }
  }

  static int64_t check_shapes(const Check& check, const Tensor& hidden, const Tensor& weight, const Tensor& target,
                              int64_t workspace_bytes) {
    check.floats(hidden, "hidden", 2, "(N, D)");
    check.floats(weight, "weight", 2, "(V, D)");
    check.dtype(weight, "weight", hidden.scalar_type());
    const int64_t N = hidden.size(0), V = weight.size(0);
    check.shape(weight, "weight", {V, hidden.size(1)}, "(V, D)");
    check.shape(target, "target", {N}, "(N,)");
    check.dtype(target, "target", at::kLong);
    TORCH_CHECK_VALUE(workspace_bytes > 0, check.op, ": workspace_bytes is ", workspace_bytes, ", expected 1 or more");
    return N;
  }
};

bool none_excused(int64_t) { return false; }

double sigmoid(double x) { return x < 0 ? std::exp(x) / (1 + std::exp(x)) : 1 / (1 + std::exp(-x)); }

// A pair's loss l at x = beta Delta, and its slope.
struct Preference {
  double beta;
  bool ipo;
  double smoothing;

  double loss(double x) const {
    if (ipo) return (x - 0.5) * (x - 0.5) / (beta * beta);
    return std::max(-x, 0.0) + std::log1p(std::exp(-std::abs(x))) + smoothing * x;  // the exponential never overflows
  }
  // -dl/dx
  double pull(double x) const { return ipo ? (1 - 2 * x) / (beta * beta) : sigmoid(-x) - smoothing; }
};

}  // namespace

std::tuple<Tensor, Tensor> linear_logprob(
    const Tensor& hidden, const Tensor& weight, const Tensor& target, int64_t ignore_index, int64_t workspace_bytes) {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  const Check check{"linear_logprob"};
  Head head(check, hidden, weight, target, workspace_bytes, false, false);
  head.check_target(check, [&](int64_t row) { return data<int64_t>(head.target)[row] == ignore_index; });
  for (const Rows rows : head.pieces()) head.logprob(head.logits(rows), rows, ignore_index);
  return {head.logp, head.lse};
}

std::tuple<Tensor, Tensor> linear_logprob_backward(
    const Tensor& grad, const Tensor& hidden, const Tensor& weight, const Tensor& target, const Tensor& lse,
    bool need_hidden, bool need_weight, int64_t workspace_bytes) {
  const Check check{"linear_logprob_backward"};
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  Head head(check, hidden, weight, target, workspace_bytes, need_hidden, need_weight);
  for (const auto& [x, name] : {std::pair{grad, "grad"}, std::pair{lse, "lse"}}) {
    check.shape(x, name, {head.N}, "(N,)");
    check.dtype(x, name, wide(hidden.scalar_type()));
  }
  head.lse = lse.contiguous();
  const Tensor scale = grad.contiguous();
  with_type(scale.scalar_type(), [&](auto type) {
    using A = Wide<decltype(type)>;
    head.check_target(check, [&](int64_t row) { return data<A>(scale)[row] == 0; });
  });
  const std::vector<Rows> pieces = head.pieces();
  head.dweight.pieces = pieces.size();
  for (const Rows rows : pieces) head.backward(head.logits(rows), rows, scale);
  return {head.dhidden, head.dweight.sum};
}

std::tuple<Tensor, Tensor, Tensor> sft_loss(
    const Tensor& hidden, const Tensor& weight, const Tensor& target, double scale, bool need_hidden, bool need_weight,
    int64_t workspace_bytes) {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  const Check check{"sft_loss"};
  Head head(check, hidden, weight, target, workspace_bytes, need_hidden, need_weight);
  head.check_target(check, none_excused);
  const Tensor coefficient = at::empty_like(head.logp).fill_(-scale);
  const std::vector<Rows> pieces = head.pieces();
  head.dweight.pieces = pieces.size();
  for (const Rows rows : pieces) {
    const Tensor z = head.logits(rows);
    head.logprob(z, rows);
    head.backward(z, rows, coefficient);
  }
  return {head.logp, head.dhidden, head.dweight.sum};
}

// All tokens of a response share one coefficient, which is known once both responses of its pair are summed. So a piece
// is a group of whole pairs, and its logits become their gradient where they are. Only a pair longer than the workspace
// is visited twice, and its logits made twice.
std::tuple<Tensor, Tensor, Tensor> pair_loss(
    const Tensor& hidden, const Tensor& weight, const Tensor& target, at::IntArrayRef lengths, const Tensor& reference,
    const Tensor& pair_weight, double beta, double scale, bool need_hidden, bool need_weight, int64_t workspace_bytes,
    bool ipo, double nll, double label_smoothing, bool length_normalised) {
  const Preference preference{beta, ipo, label_smoothing};
  const Check check{"pair_loss"};
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  Head head(check, hidden, weight, target, workspace_bytes, need_hidden, need_weight);
  head.check_target(check, none_excused);
  const int64_t S = lengths.size(), P = S / 2;
  TORCH_CHECK_VALUE(S % 2 == 0, "pair_loss: lengths has ", S, " entries, expected real and generated by turns");
  int64_t sum = 0;
  for (const int64_t length : lengths) {
    TORCH_CHECK_VALUE(length >= 0, "pair_loss: lengths has ", length, ", expected 0 or more");
    sum += length;
  }
  TORCH_CHECK_VALUE(sum == head.N, "pair_loss: lengths add up to ", sum, ", but hidden has ", head.N, " rows");
  const auto dtype = wide(hidden.scalar_type());
  check.shape(reference, "reference", {S}, "(S,)");
  check.dtype(reference, "reference", dtype);
  check.shape(pair_weight, "pair_weight", {P}, "(P,)");
  check.dtype(pair_weight, "pair_weight", dtype);

  const Tensor ref = reference.contiguous(), weights = pair_weight.contiguous();
  const Tensor sums = at::empty({S}, ref.options()), coefficient = at::empty_like(head.logp);
  struct Group {
    int64_t first, last;  // pairs first to last - 1
    Rows rows;
    std::vector<Rows> visits;
  };
  std::vector<Group> groups;
  for (int64_t first = 0, begin = 0; first < P;) {
    int64_t last = first, end = begin;
    do {
      end += lengths[2 * last] + lengths[2 * last + 1];
      ++last;
    } while (last < P && end + lengths[2 * last] + lengths[2 * last + 1] - begin <= head.most);
    groups.push_back({first, last, {begin, end}, head.pieces({begin, end})});
    head.dweight.pieces += groups.back().visits.size();
    first = last;
    begin = end;
  }
  for (const auto& [first, last, all, visits] : groups) {
    const int64_t begin = all.begin, from = first, to = last;  // a lambda takes no structured binding
    Tensor z;
    for (const Rows rows : visits) {
      z = head.logits(rows);
      head.logprob(z, rows);
    }
    with_type(dtype, [&](auto type) {
      using A = Wide<decltype(type)>;
      const A *logp = data<A>(head.logp) + begin, *wanted = data<A>(ref);
      A *total = data<A>(sums), *scales = data<A>(coefficient) + begin;
      for (int64_t pair = from; pair < to; ++pair) {
        for (int64_t side = 2 * pair; side < 2 * pair + 2; ++side) {
          double logp_sum = 0;
          for (int64_t i = 0; i < lengths[side]; ++i) logp_sum += *logp++;
          total[side] = static_cast<A>(logp_sum);
        }
        const double tokens = std::max<int64_t>(1, lengths[2 * pair]);
        const double by_real = length_normalised ? tokens : 1;
        const double by_generated = length_normalised ? std::max<int64_t>(1, lengths[2 * pair + 1]) : 1;
        const double real = (double(total[2 * pair]) - wanted[2 * pair]) / by_real;
        const double generated = (double(total[2 * pair + 1]) - wanted[2 * pair + 1]) / by_generated;
        const double pull = -scale * beta * data<A>(weights)[pair] * preference.pull(beta * (real - generated));
        scales = std::fill_n(scales, lengths[2 * pair], static_cast<A>(pull / by_real - scale * nll / tokens));
        scales = std::fill_n(scales, lengths[2 * pair + 1], static_cast<A>(-pull / by_generated));
      }
    });
    for (const Rows rows : visits) {
      if (visits.size() > 1 && (need_hidden || need_weight)) z = head.logits(rows);
      head.backward(z, rows, coefficient);
    }
  }
  return {sums, head.dhidden, head.dweight.sum};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> weighted_dpo(
    const Tensor& sums_real, const Tensor& sums_generated, const Tensor& ref_real, const Tensor& ref_generated,
    const Tensor& weight, double beta, bool ipo, double label_smoothing) {
  const Preference preference{beta, ipo, label_smoothing};
  const Check check{"weighted_dpo"};
  check.floats(sums_real, "sums_real", 1, "(P,)");
  check.like(sums_generated, "sums_generated", sums_real, "sums_real");
  check.like(ref_real, "ref_real", sums_real, "sums_real");
  check.like(ref_generated, "ref_generated", sums_real, "sums_real");
  check.like(weight, "weight", sums_real, "sums_real");
  check.dtype(sums_real, "sums_real", wide(sums_real.scalar_type()));
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  const Tensor a = sums_real.contiguous(), b = sums_generated.contiguous(), ref_a = ref_real.contiguous(),
               ref_b = ref_generated.contiguous(), w = weight.contiguous();
  const int64_t P = a.size(0);
  const Tensor loss = at::zeros({}, a.options()), unweighted = at::empty_like(a), chosen = at::empty_like(a),
               rejected = at::empty_like(a), coefficient = at::empty_like(a);
  with_type(a.scalar_type(), [&](auto type) {
    using A = Wide<decltype(type)>;
    double sum = 0;  // of all pairs in order: there are few, and their order is fixed
    for (int64_t p = 0; p < P; ++p) {
      const double good = beta * (double(data<A>(a)[p]) - data<A>(ref_a)[p]);
      const double bad = beta * (double(data<A>(b)[p]) - data<A>(ref_b)[p]);
      const double x = good - bad, s = data<A>(w)[p], l = preference.loss(x);
      sum += s * l;
      data<A>(unweighted)[p] = static_cast<A>(l);
      data<A>(chosen)[p] = static_cast<A>(good);
      data<A>(rejected)[p] = static_cast<A>(bad);
      data<A>(coefficient)[p] = static_cast<A>(-beta * s * preference.pull(x));
    }
    *data<A>(loss) = static_cast<A>(sum);
  });
  return {loss, unweighted, chosen, rejected, coefficient};
}

}  // namespace ldalign::cpu
