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

#include "check.h"
#include "ops.h"

namespace ldalign::cpu {
namespace {

constexpr int64_t kTile = 32;  // query tokens whose scores are held at once: in the second-level cache
constexpr int64_t kUnlimited = std::numeric_limits<int64_t>::max();

int64_t rounded(int64_t n) { return (n + kAlign - 1) / kAlign * kAlign; }

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

// One key/value head of one group, and the memory its tiles use again and again. Everything here is wide; widths and
// numbers of keys are rounded up to whole vectors, with zeros.
template <class T>
struct Task {
  using A = Wide<T>;
  const Batch& batch;
  const Group& group;
  const int64_t head, E, G, width;  // width: E, rounded up
  int64_t most_keys = 0;            // of a segment, rounded up
  std::vector<A> keys, values;      // (keys, width) of the segment at hand, by position
  std::vector<A> keys_t, values_t;  // (width, most_keys): transposed
  std::vector<A> queries, scores, out, sums;

  Task(const Batch& batch, const Group& group, int64_t head)
      : batch(batch), group(group), head(head), E(batch.E), G(batch.G()), width(rounded(batch.E)) {
    int64_t most_tokens = 0;
    for (const Segment& s : group.segments) {
      most_keys = std::max(most_keys, rounded(s.keys()));
      most_tokens = std::max(most_tokens, s.size());
    }
    const int64_t rows = G * std::min(most_tokens, kTile);
    keys.resize(most_keys * width);
    values.resize(most_keys * width);
    keys_t.resize(most_keys * width);
    queries.resize(rows * width);
    out.resize(rows * width);
    scores.resize(rows * most_keys);
    sums.resize(rows);
  }

  const T* at(int64_t token, int64_t head_index) const {
    return data<T>(batch.qkv) + token * batch.qkv.stride(0) + head_index * E;
  }

  // The keys (first = H) or values (H + K) a segment sees.
  void gather_keys(const Segment& s, int64_t first, std::vector<A>& to) const {
    A* row = to.data();
    for (const Run& run : runs(s, 0, s.keys())) {
      for (int64_t i = 0; i < run.size; ++i, row += width) kernels<T>().widen(at(run.token + i, first + head), E, row);
    }
    std::fill(row, to.data() + rounded(s.keys()) * width, A(0));
  }

  void transpose(const std::vector<A>& from, const Segment& s, std::vector<A>& to) const {
    const int64_t n = rounded(s.keys());
    for (int64_t e = 0; e < E; ++e) {
      for (int64_t j = 0; j < n; ++j) to[e * most_keys + j] = from[j * width + e];
    }
  }

  struct Tile {
    int64_t token, tokens;  // of the batch
    int64_t key, columns;   // a multiple of the vectors' width at or before the first key in sight; how many, rounded
    int64_t seen;           // columns the first query sees, but for the window
    int64_t last;           // positions up to here are seen
  };

  template <class Body>
  void tiles(const Segment& s, const Body& body) const {
    const int64_t count = (s.size() + kTile - 1) / kTile;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t from = s.size() * i / count, to = s.size() * (i + 1) / count;
      const int64_t first = s.prefix() + from, last = s.prefix() + to;
      int64_t key = batch.window == kUnlimited ? 0 : std::max<int64_t>(0, first - batch.window + 1);
      key -= key % kAlign;
      body(Tile{s.begin + from, to - from, key, rounded(last - key), first - key + 1, last});
    }
  }

  // The rows of the group's query heads, (G tokens, width), from a tensor with `stride` values a token.
  void gather(const T* from, int64_t stride, const Tile& tile, std::vector<A>& to) const {
    A* row = to.data();
    for (int64_t g = 0; g < G; ++g) {
      for (int64_t i = 0; i < tile.tokens; ++i, row += width) {
        kernels<T>().widen(from + (tile.token + i) * stride + (head * G + g) * E, E, row);
      }
    }
  }

  void scatter(const std::vector<A>& from, const Tile& tile, T* to, int64_t stride) const {
    const A* row = from.data();
    for (int64_t g = 0; g < G; ++g) {
      for (int64_t i = 0; i < tile.tokens; ++i, row += width) {
        kernels<T>().round(row, E, to + (tile.token + i) * stride + (head * G + g) * E);
      }
    }
  }

  // to (rows, columns) = from (rows, width) against the keys or values of the tile, which are transposed.
  void against(const std::vector<A>& from, const std::vector<A>& transposed, const Tile& tile, A* to) const {
    kernels<A>().product(from.data(), width, 1, transposed.data() + tile.key, most_keys, G * tile.tokens, tile.columns,
                         E, false, to, tile.columns);
  }

  // to (rows, width) = weights (rows, columns) times the tile's keys or values.
  void combine(const std::vector<A>& weights, const std::vector<A>& rows, const Tile& tile, std::vector<A>& to) const {
    kernels<A>().product(weights.data(), tile.columns, 1, rows.data() + tile.key * width, width, G * tile.tokens, width,
                         tile.columns, false, to.data(), width);
  }

  void forward(const Tensor& result, const Tensor& lse) {
    for (const Segment& s : group.segments) {
      gather_keys(s, batch.H, keys);
      gather_keys(s, batch.H + batch.K, values);
      transpose(keys, s, keys_t);
      tiles(s, [&](const Tile& tile) {
        gather(data<T>(batch.qkv), batch.qkv.stride(0), tile, queries);
        against(queries, keys_t, tile, scores.data());
        kernels<A>().attention_softmax(scores.data(), G * tile.tokens, tile.columns, tile.tokens, tile.seen,
                                       batch.window, scale(), sums.data());
        combine(scores, values, tile, out);
        scatter(out, tile, data<T>(result), batch.H * E);
        for (int64_t g = 0; g < G; ++g) {
          for (int64_t i = 0; i < tile.tokens; ++i) {
            data<A>(lse)[(tile.token + i) * batch.H + head * G + g] = sums[g * tile.tokens + i];
          }
        }
      });
    }
  }

  void backward(const Tensor& grad, const Tensor& lse, const Tensor& delta, const Tensor& dqkv) {
    values_t.resize(keys_t.size());
    std::vector<A> upstream(queries.size()), score_grads(scores.size()), deltas(sums.size());
    std::vector<A> dk(group.tokens() * width), dv(group.tokens() * width);
    for (const Segment& s : group.segments) {
      gather_keys(s, batch.H, keys);
      gather_keys(s, batch.H + batch.K, values);
      transpose(keys, s, keys_t);
      transpose(values, s, values_t);
      tiles(s, [&](const Tile& tile) {
        gather(data<T>(batch.qkv), batch.qkv.stride(0), tile, queries);
        gather(data<T>(grad), batch.H * E, tile, upstream);
        for (int64_t g = 0; g < G; ++g) {
          for (int64_t i = 0; i < tile.tokens; ++i) {
            const int64_t from = (tile.token + i) * batch.H + head * G + g, to = g * tile.tokens + i;
            sums[to] = data<A>(lse)[from];
            deltas[to] = data<A>(delta)[from];
          }
        }
        against(queries, keys_t, tile, scores.data());
        against(upstream, values_t, tile, score_grads.data());
        kernels<A>().attention_gradient(scores.data(), score_grads.data(), G * tile.tokens, tile.columns, tile.tokens,
                                        tile.seen, batch.window, scale(), sums.data(), deltas.data());
        combine(score_grads, keys, tile, out);
        scatter(out, tile, data<T>(dqkv), batch.heads() * E);
        add(scores, upstream, dv, s, tile);
        add(score_grads, queries, dk, s, tile);
      });
    }
    for (int64_t i = 0; i < group.tokens(); ++i) {
      T* row = data<T>(dqkv) + ((group.begin() + i) * batch.heads() + batch.H + head) * E;
      kernels<T>().round(dk.data() + i * width, E, row);
      kernels<T>().round(dv.data() + i * width, E, row + batch.K * E);
    }
  }

 private:
  A scale() const { return static_cast<A>(1 / std::sqrt(static_cast<double>(E))); }

  // sum (tokens of the group, width) += weights^T rows, each row where its key lies.
  void add(const std::vector<A>& weights, const std::vector<A>& rows, std::vector<A>& sum, const Segment& s,
           const Tile& tile) const {
    for (const Run& run : runs(s, tile.key, tile.last)) {
      kernels<A>().product(weights.data() + run.position - tile.key, 1, tile.columns, rows.data(), width, run.size,
                           width, G * tile.tokens, true, sum.data() + (run.token - group.begin()) * width, width);
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
