// Attention over a packed batch: segments [begin, end) that see themselves causally and a prefix [prefix_begin,
// prefix_end) of earlier tokens, a pair's prompt.
//
// A key's index within (prefix, own tokens) is its position, so what a query sees is one run of columns. The work is cut
// into tasks, a key/value head of a prompt with its responses each, which share nothing: threads take them by turns,
// dearest first, and every product inside is serial. Scores are made tile by tile of the queries and made again in the
// backward; the gradients of keys and values are summed in float32 and rounded once.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include "check.h"
#include "ops.h"

namespace ldalign::cpu {
namespace {

constexpr int64_t kTile = 192;   // query tokens whose scores are held at once
constexpr int64_t kRound = 32;   // sizes of products are rounded up to it, with zeros: oneDNN is slow on odd ones
constexpr int64_t kUnlimited = std::numeric_limits<int64_t>::max();

int64_t rounded(int64_t n) { return (n + kRound - 1) / kRound * kRound; }

struct Segment {
  int64_t begin, end, prefix_begin, prefix_end;
  int64_t size() const { return end - begin; }
  int64_t prefix() const { return prefix_end - prefix_begin; }
  int64_t keys() const { return prefix() + size(); }
};

struct Run {
  int64_t position, token, size;
};

// Segments that share tokens: one without a prefix, and those that follow it with one.
struct Group {
  std::vector<Segment> segments;
  int64_t begin() const { return segments.front().begin; }
  int64_t tokens() const { return segments.back().end - begin(); }
};

struct Batch {
  int64_t N, H, K, E, window;
  Tensor qkv;  // (N, H + 2K, E), heads and widths dense
  std::vector<Group> groups;

  int64_t G() const { return H / K; }
  int64_t heads() const { return H + 2 * K; }

  Batch(const Check& check, const Tensor& qkv_in, int64_t heads, const Tensor& segments, int64_t window_in)
      : N(qkv_in.size(0)), H(heads), K((qkv_in.size(1) - heads) / 2), E(qkv_in.size(2)), window(window_in),
        qkv(qkv_in.stride(2) == 1 && qkv_in.stride(1) == E ? qkv_in : qkv_in.contiguous()) {
    TORCH_CHECK_VALUE(H > 0 && K > 0 && H + 2 * K == qkv_in.size(1) && H % K == 0, check.op, ": qkv has ",
                      qkv_in.size(1), " heads and heads is ", heads, ", expected heads + twice a divisor of it");
    TORCH_CHECK_VALUE(window > 0, check.op, ": window is ", window, ", expected 1 or more");
    TORCH_CHECK_VALUE(segments.dim() == 2 && segments.size(1) == 4, check.op, ": segments has shape ",
                      segments.sizes(), ", expected (S, 4)");
    check.dtype(segments, "segments", at::kLong);
    const Tensor table = segments.contiguous();
    int64_t done = 0;
    for (int64_t i = 0; i < table.size(0); ++i) {
      const int64_t* row = data<int64_t>(table) + 4 * i;
      const Segment s{row[0], row[1], row[2], row[3]};
      if (s.prefix() == 0) groups.emplace_back();
      TORCH_CHECK_VALUE(s.begin == done && s.end > s.begin && s.prefix() >= 0 && !groups.empty() &&
                            (s.prefix() == 0 || (s.prefix_begin >= groups.back().begin() && s.prefix_end <= s.begin)),
                        check.op, ": segment ", i, " is (", row[0], ", ", row[1], ", ", row[2], ", ", row[3],
                        "), expected to begin at ", done, ", with a prefix inside the prompt before it");
      groups.back().segments.push_back(s);
      done = s.end;
    }
    TORCH_CHECK_VALUE(done == N, check.op, ": segments end at ", done, ", but qkv has ", N, " rows");
  }

  // work(group, key/value head) for all of them.
  template <class Work>
  void each(const Work& work) const {
    std::vector<double> cost;
    for (const Group& group : groups) {
      double scores = 0;
      for (const Segment& s : group.segments) scores += double(s.size()) * s.keys();
      cost.insert(cost.end(), K, scores);
    }
    std::vector<int64_t> order(cost.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return cost[a] > cost[b]; });
    std::atomic<size_t> next{0};
    at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), order.size()), 1, [&](int64_t begin, int64_t end) {
      at::AutoDispatchBelowADInplaceOrView no_autograd;
      for (int64_t thread = begin; thread < end; ++thread) {
        for (size_t i; (i = next++) < order.size();) work(groups[order[i] / K], order[i] % K);
      }
    });
  }
};

// Where positions [from, to) of a segment's keys lie among the tokens: at most two runs.
std::vector<Run> runs(const Segment& s, int64_t from, int64_t to) {
  std::vector<Run> found;
  if (from < s.prefix()) found.push_back({from, s.prefix_begin + from, std::min(to, s.prefix()) - from});
  const int64_t own = std::max(from, s.prefix());
  if (own < to) found.push_back({own, s.begin + own - s.prefix(), to - own});
  return found;
}

// One key/value head of one group, and the memory its tiles use again and again.
template <class T>
struct Task {
  using A = Wide<T>;
  const Batch& batch;
  const Group& group;
  const int64_t head, E, G;
  Tensor keys, values, queries, scores, out;

  Task(const Batch& batch, const Group& group, int64_t head)
      : batch(batch), group(group), head(head), E(batch.E), G(batch.G()) {
    int64_t most_keys = 0, most_tokens = 0;
    for (const Segment& s : group.segments) {
      most_keys = std::max(most_keys, s.keys());
      most_tokens = std::max(most_tokens, s.size());
    }
    const int64_t columns = rounded(most_keys) + kRound, rows = rounded(G * std::min(most_tokens, kTile));
    keys = empty({columns, E});
    values = empty({columns, E});
    queries = empty({rows, E});
    out = empty({rows, E});
    scores = empty({rows * columns});
  }

  Tensor empty(at::IntArrayRef sizes) const { return at::empty(sizes, at::TensorOptions(batch.qkv.scalar_type())); }

  T* at(int64_t token, int64_t head_index) const {
    return data<T>(batch.qkv) + token * batch.qkv.stride(0) + head_index * E;
  }

  // The keys and values a segment sees, by position; zeros up to where a rounded product may read.
  void gather_keys(const Segment& s) {
    for (const auto& [to, first] : {std::pair{keys, batch.H}, std::pair{values, batch.H + batch.K}}) {
      T* row = data<T>(to);
      for (const Run& run : runs(s, 0, s.keys())) {
        for (int64_t i = 0; i < run.size; ++i, row += E) std::copy_n(at(run.token + i, first + head), E, row);
      }
      std::fill_n(reinterpret_cast<char*>(row), (data<T>(to) + to.numel() - row) * sizeof(T), 0);
    }
  }

  struct Tile {
    int64_t token, tokens;    // of the batch
    int64_t key, columns;     // first key in sight of any query, and how many are, rounded
    int64_t seen;             // columns the first query sees, but for the window
    int64_t last;             // positions up to here are seen
  };

  template <class Body>
  void tiles(const Segment& s, const Body& body) const {
    const int64_t count = (s.size() + kTile - 1) / kTile;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t from = s.size() * i / count, to = s.size() * (i + 1) / count;
      const int64_t first = s.prefix() + from, last = s.prefix() + to;
      const int64_t key = batch.window == kUnlimited ? 0 : std::max<int64_t>(0, first - batch.window + 1);
      body(Tile{s.begin + from, to - from, key, rounded(last - key), first - key + 1, last});
    }
  }

  // The rows of a group's query heads, (G tokens, E), from a tensor of heads_per_token heads; zeros up to the rounding.
  Tensor gather(const T* from, int64_t token_stride, const Tile& tile, const Tensor& to) const {
    T* row = data<T>(to);
    for (int64_t g = 0; g < G; ++g) {
      for (int64_t i = 0; i < tile.tokens; ++i, row += E) {
        std::copy_n(from + (tile.token + i) * token_stride + (head * G + g) * E, E, row);
      }
    }
    const int64_t rows = rounded(G * tile.tokens);
    std::fill_n(reinterpret_cast<char*>(row), (data<T>(to) + rows * E - row) * sizeof(T), 0);
    return to.narrow(0, 0, rows);
  }

  void scatter(const Tensor& from, const Tile& tile, T* to, int64_t token_stride) const {
    const T* row = data<T>(from);
    for (int64_t g = 0; g < G; ++g) {
      for (int64_t i = 0; i < tile.tokens; ++i, row += E) {
        std::copy_n(row, E, to + (tile.token + i) * token_stride + (head * G + g) * E);
      }
    }
  }

  Tensor visible(const Tensor& all, const Tile& tile) const { return all.narrow(0, tile.key, tile.columns); }

  void forward(const Tensor& result, const Tensor& lse) {
    const auto& softmax = kernels<T>().attention_softmax;
    std::vector<A> sums(queries.size(0));
    for (const Segment& s : group.segments) {
      gather_keys(s);
      tiles(s, [&](const Tile& tile) {
        const Tensor q = gather(data<T>(batch.qkv), batch.qkv.stride(0), tile, queries);
        Tensor z = scores.narrow(0, 0, q.size(0) * tile.columns).view({q.size(0), tile.columns});
        at::mm_out(z, q, visible(keys, tile).t());
        softmax(data<T>(z), G * tile.tokens, tile.columns, tile.tokens, tile.seen, batch.window, scale(), sums.data());
        Tensor o = out.narrow(0, 0, q.size(0));
        at::mm_out(o, z, visible(values, tile));
        scatter(o, tile, data<T>(result), batch.H * E);
        for (int64_t g = 0; g < G; ++g) {
          for (int64_t i = 0; i < tile.tokens; ++i) {
            data<A>(lse)[(tile.token + i) * batch.H + head * G + g] = sums[g * tile.tokens + i];
          }
        }
      });
    }
  }

  void backward(const Tensor& grad, const Tensor& lse, const Tensor& delta, const Tensor& dqkv) {
    const auto& all = kernels<T>();
    const Tensor upstream = empty(queries.sizes()), score_grads = empty(scores.sizes());
    const Tensor product = empty({keys.size(0), E});
    const auto wide_options = at::TensorOptions(wide(batch.qkv.scalar_type()));
    const Tensor dk = at::zeros({group.tokens(), E}, wide_options), dv = at::zeros({group.tokens(), E}, wide_options);
    std::vector<A> sums(queries.size(0)), deltas(queries.size(0));
    for (const Segment& s : group.segments) {
      gather_keys(s);
      tiles(s, [&](const Tile& tile) {
        const Tensor q = gather(data<T>(batch.qkv), batch.qkv.stride(0), tile, queries);
        const Tensor dy = gather(data<T>(grad), batch.H * E, tile, upstream);
        for (int64_t g = 0; g < G; ++g) {
          for (int64_t i = 0; i < tile.tokens; ++i) {
            const int64_t from = (tile.token + i) * batch.H + head * G + g, to = g * tile.tokens + i;
            sums[to] = data<A>(lse)[from];
            deltas[to] = data<A>(delta)[from];
          }
        }
        const int64_t size = q.size(0) * tile.columns;
        Tensor p = scores.narrow(0, 0, size).view({q.size(0), tile.columns});
        Tensor ds = score_grads.narrow(0, 0, size).view(p.sizes());
        at::mm_out(p, q, visible(keys, tile).t());
        at::mm_out(ds, dy, visible(values, tile).t());
        all.attention_gradient(data<T>(p), data<T>(ds), G * tile.tokens, tile.columns, tile.tokens, tile.seen,
                               batch.window, scale(), sums.data(), deltas.data());
        Tensor dq = out.narrow(0, 0, q.size(0));
        at::mm_out(dq, ds, visible(keys, tile));
        scatter(dq, tile, data<T>(dqkv), batch.heads() * E);
        add(p, dy, dv, s, tile, product);
        add(ds, q, dk, s, tile, product);
      });
    }
    for (int64_t i = 0; i < group.tokens(); ++i) {
      T* row = data<T>(dqkv) + ((group.begin() + i) * batch.heads() + batch.H + head) * E;
      all.round(data<A>(dk) + i * E, E, row);
      all.round(data<A>(dv) + i * E, E, row + batch.K * E);
    }
  }

 private:
  A scale() const { return static_cast<A>(1 / std::sqrt(static_cast<double>(E))); }

  // sum (tokens of the group, E) += left^T right, each row where its key lies.
  void add(const Tensor& left, const Tensor& right, const Tensor& sum, const Segment& s, const Tile& tile,
           const Tensor& product) const {
    Tensor made = product.narrow(0, 0, tile.columns);
    at::mm_out(made, left.t(), right);
    for (const Run& run : runs(s, tile.key, tile.last)) {
      kernels<T>().add(data<T>(made) + (run.position - tile.key) * E, run.size * E,
                       data<A>(sum) + (run.token - group.begin()) * E);
    }
  }
};

}  // namespace

std::tuple<Tensor, Tensor> pair_attention(
    const Tensor& qkv, int64_t heads, const Tensor& segments, std::optional<int64_t> window) {
  const Check check{"pair_attention"};
  check.floats(qkv, "qkv", 3, "(N, H + 2K, E)");
  const Batch batch(check, qkv, heads, segments, window.value_or(kUnlimited));
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  const Tensor out = at::empty({batch.N, batch.H, batch.E}, qkv.options());
  const Tensor lse = at::empty({batch.N, batch.H}, qkv.options().dtype(wide(qkv.scalar_type())));
  with_type(qkv.scalar_type(), [&](auto type) {
    using T = decltype(type);
    batch.each([&](const Group& group, int64_t head) { Task<T>(batch, group, head).forward(out, lse); });
  });
  return {out, lse};
}

Tensor pair_attention_backward(
    const Tensor& grad, const Tensor& qkv, const Tensor& out, const Tensor& lse, int64_t heads, const Tensor& segments,
    std::optional<int64_t> window) {
  const Check check{"pair_attention_backward"};
  check.floats(qkv, "qkv", 3, "(N, H + 2K, E)");
  const Batch batch(check, qkv, heads, segments, window.value_or(kUnlimited));
  check.like(grad, "grad", out, "out");
  check.shape(out, "out", {batch.N, batch.H, batch.E}, "(N, H, E)");
  check.shape(lse, "lse", {batch.N, batch.H}, "(N, H)");
  check.dtype(lse, "lse", wide(qkv.scalar_type()));
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  const Tensor dy = grad.contiguous(), y = out.contiguous(), sums = lse.contiguous();
  const Tensor delta = at::empty_like(sums), dqkv = at::empty({batch.N, batch.heads(), batch.E}, qkv.options());
  with_type(qkv.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using A = Wide<T>;
    const auto& dot = kernels<T>().dot;
    at::parallel_for(0, batch.N * batch.H, 512, [&](int64_t begin, int64_t end) {
      dot(data<T>(dy) + begin * batch.E, data<T>(y) + begin * batch.E, end - begin, batch.E, data<A>(delta) + begin);
    });
    batch.each([&](const Group& group, int64_t head) { Task<T>(batch, group, head).backward(dy, sums, delta, dqkv); });
  });
  return dqkv;
}

}  // namespace ldalign::cpu
