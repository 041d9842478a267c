// Generation on the CPU: a Mistral's layers over a paged key/value cache, and products with packed weights.
//
// A batch is rows of new tokens: one for a row that is being continued, a run of them for a prompt. Prompts and
// continuations go through the same products together. The threads (team.h) go through all layers in one region; what a
// thread computes for a row never depends on the other rows, so a row's results have the same bits in any company.
//
// Packed weights: panels of 32 rows, word by word (decode_kernels.h). Pages hold 16 tokens of one key/value head: keys
// word by word, (words of E, 16, values of a word), values (16, E'), E' being E rounded up to 16.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <vector>

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/record_function.h>

#include "check.h"
#include "ops.h"
#include "team.h"

namespace ldalign::cpu {
namespace {

// A part of the step, for torch's profiler: the caller's time stands for all threads'.
#define LDALIGN_PART(member, name)                            \
  at::RecordFunction part_of_step(at::RecordScope::FUNCTION); \
  if (member.caller() && part_of_step.isActive()) part_of_step.before("ldalign_cpp::decode_" name)

constexpr int64_t kQueries = 32;  // new tokens of a row whose attention is computed together
constexpr int64_t kNormed = 8;    // tokens that a thread norms at a time
constexpr int64_t kGated = 4;     // tokens whose gates it multiplies at a time
// Of more rows a piece of a product goes straight to its place: to move it there takes a tenth of its time, and a step
// with prompts is long enough to wait for a thread that was put aside.
constexpr int64_t kClaimedRows = 64;

int64_t divided(int64_t n, int64_t by) { return (n + by - 1) / by; }
int64_t rounded(int64_t n) { return divided(n, kAlign) * kAlign; }

// f(T{}) for the types that can be generated in.
template <class F>
void with_decode_type(at::ScalarType dtype, const F& f) {
  if (dtype == at::kBFloat16) return f(bf16{});
  f(float{});
}

void check_decode_type(const Check& check, const Tensor& x, const char* name) {
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, check.op, ": ", name, " is ",
                    x.scalar_type(), ", expected float32 or bfloat16");
}

// Rows of values in 8 bits, `stride` bytes from one to the next, with their groups (rows, groups of K), whatever K is.
struct Int8Rows {
  int8_t* q;
  Quantised* groups;
  int64_t stride;
};

// Buffers for N rows of at most K values, which `rows` points into.
struct Int8Buffer {
  Tensor q, groups;
  Int8Rows rows;

  Int8Buffer(int64_t N, int64_t K)
      : q(at::empty({N, divided(K, kGroup) * kGroup}, at::kChar)),
        groups(at::empty({N, divided(K, kGroup), int64_t(sizeof(Quantised))}, at::kByte)),
        rows{data<int8_t>(q), data<Quantised>(groups), q.size(1)} {}
};

// Rows [first, first + count) of x (rows, K) go into the same rows of `to`.
template <class T>
void quantise(const T* x, int64_t first, int64_t count, int64_t K, const Int8Rows& to) {
  kernels<T>().quantise(x + first * K, count, K, to.q + first * to.stride, to.stride,
                        to.groups + first * divided(K, kGroup));
}

template <class T>
void quantise(Member& member, const T* x, int64_t rows, int64_t K, const Int8Rows& to) {
  member.by_turns(divided(rows, kNormed), [&](int64_t turn) {
    const int64_t first = turn * kNormed;
    quantise(x, first, std::min(rows - first, kNormed), K, to);
  });
}

// y (rows, N) by panels of a packed weight: kernel(panel, until, columns, result, ld) computes some of them. `values`: of
// x and a panel, what the panel costs.
template <class O, class Kernel>
void by_panels(Member& member, int64_t rows, int64_t panels, int64_t values, int64_t N, O* y, const Kernel& kernel) {
  // A panel calls the next one into the cache, so a thread keeps to panels that follow each other.
  if (rows > kClaimedRows) {
    member.by_shares(panels, [&](int64_t panel) {
      kernel(panel, panel + 1, N - panel * kPanel, y + panel * kPanel, N);
    });
    return;
  }
  // Of small panels a thread takes as many at a time as make it worth the taking, and leaves pieces enough to share.
  const int64_t worth = 400000 / std::max<int64_t>(1, rows * values), few = panels / (16 * member.threads());
  const int64_t step = std::max<int64_t>(1, std::min(worth, few));
  member.by_shares_claimed(divided(panels, step), [&](int64_t turn, const auto& claim) {
    const int64_t first = turn * step, last = std::min(panels, first + step), ld = (last - first) * kPanel;
    const int64_t columns = N - first * kPanel;
    static thread_local std::vector<O> result;
    if (int64_t(result.size()) < rows * ld) result.resize(rows * ld);
    kernel(first, last, columns, result.data(), ld);
    if (!claim()) return;
    for (int64_t r = 0; r < rows; ++r) {
      std::copy_n(result.data() + r * ld, std::min(columns, ld), y + r * N + first * kPanel);
    }
  });
}

// x (rows, K) times a packed weight (panels, K, 32) -> y (rows, N).
template <class T, class O>
void product(Member& member, const T* x, int64_t rows, const Tensor& packed, int64_t N, O* y) {
  const int64_t K = packed.size(1), panel = K * kPanel;
  const T* weight = data<T>(packed);
  by_panels(member, rows, packed.size(0), panel, N, y,
            [&](int64_t first, int64_t last, int64_t columns, O* result, int64_t ld) {
              const T* from = weight + first * panel;
              if constexpr (std::is_same_v<T, O>) {
                kernels<T>().packed_product(x, K, rows, from, K, columns, 0, last - first, result, ld);
              } else {
                kernels<T>().packed_product_wide(x, K, rows, from, K, columns, 0, last - first, result, ld);
              }
            });
}

// The same of rows and a weight in 8 bits, scales (panels, groups, 32).
template <class O>
void product(Member& member, const Int8Rows& x, int64_t rows, const Tensor& packed, const Tensor& scales, int64_t N,
             O* y) {
  const int64_t K = packed.size(1), panel = K * kPanel, panel_scales = scales.size(1) * kPanel;
  const int8_t* weight = data<int8_t>(packed);
  const float* scale = data<float>(scales);
  by_panels(member, rows, packed.size(0), panel, N, y,
            [&](int64_t first, int64_t last, int64_t columns, O* result, int64_t ld) {
              kernels<O>().packed_product_int8(x.q, x.stride, x.groups, rows, weight + first * panel,
                                               scale + first * panel_scales, K, columns, 0, last - first, result, ld);
            });
}

// A packed weight for x of K values a row: in x's dtype, or with scales in 8 bits.
void check_packed(const Check& check, const Tensor& packed, const Tensor* scales, int64_t N, int64_t K,
                  at::ScalarType dtype) {
  const int64_t panels = divided(N, kPanel), groups = divided(K, kGroup);
  check.shape(packed, "packed", {panels, scales ? groups * kGroup : K, kPanel}, "(panels, K, 32)");
  check.dtype(packed, "packed", scales ? at::kChar : dtype);
  TORCH_CHECK_VALUE(packed.is_contiguous(), check.op, ": packed must be contiguous");
  if (scales) {
    check.shape(*scales, "scales", {panels, groups, kPanel}, "(panels, groups, 32)");
    check.dtype(*scales, "scales", at::kFloat);
    TORCH_CHECK_VALUE(scales->is_contiguous(), check.op, ": scales must be contiguous");
  } else {
    const int64_t per_word = 4 / c10::elementSize(dtype);
    TORCH_CHECK_VALUE(K % per_word == 0, check.op, ": K is ", K, ", expected whole words");
  }
}

// Where the new tokens of one row lie, and its cache.
struct Row {
  int64_t token, count;  // of the batch
  int64_t held;          // tokens in the cache already
  const int32_t* pages;
};

// A run of a row's queries.
struct Run {
  const Row* row;
  int64_t from, to;
  int64_t cost() const { return (to - from) * (row->held + to); }
};

// The attention of a run in the heads [head, until).
struct Task {
  const Run* run;
  int64_t head, until;
};

// The new keys and values of a row in the heads [head, until).
struct Put {
  const Row* row;
  int64_t head, until;
};

template <class T>
class Decoder {
  using A = Wide<T>;

 public:
  int64_t N, D, H, K, E, width, window;
  A eps;
  std::vector<Row> rows;
  std::vector<Put> puts;
  std::vector<Run> runs;
  std::vector<Task> tasks;
  const A *cos, *sin;

  // The cache of one layer.
  struct Cache {
    T *keys, *values;
  };

  // A row's new keys, turned, and values of one head go into its pages.
  void put(const Cache& cache, const T* qkv, const Row& row, int64_t head) const {
    constexpr int64_t J = 4 / sizeof(T);
    static thread_local std::vector<T> turned;
    turned.resize(row.count * E);
    const int64_t stride = (H + 2 * K) * E;
    const T* from = qkv + row.token * stride + (H + head) * E;
    kernels<T>().rope(from, stride, cos + row.held * (E / 2), sin + row.held * (E / 2), A(1), row.count, 1, E,
                      turned.data(), E);
    for (int64_t i = 0; i < row.count; ++i) {
      const int64_t position = row.held + i, slot = position % kPageTokens;
      const int64_t page = row.pages[position / kPageTokens] * K + head;
      T* key = cache.keys + page * E * kPageTokens + slot * J;
      for (int64_t e = 0; e < E; e += J) {
        __builtin_memcpy(key + e * kPageTokens, turned.data() + i * E + e, 4);
      }
      __builtin_memcpy(cache.values + (page * kPageTokens + slot) * width, from + i * stride + K * E, E * sizeof(T));
    }
  }

  // The run's attention in the heads [head, until), page by page through all of them: side by side they lie in memory,
  // and one after the other it gives three times the bytes that it gives here and there.
  template <class Claim>
  void attend(const Cache& cache, const T* qkv, const Task& task, T* out, const Claim& claim) const {
    const Run& run = *task.run;
    const int64_t head = task.head, until = task.until;
    const Row& row = *run.row;
    const int64_t n = run.to - run.from, G = H / K, M = G * n, heads = until - head, stride = (H + 2 * K) * E;
    const int64_t position = row.held + run.from, last = position + n;  // of the first query; what the last one sees
    const int64_t first = window < position + 1 ? (position + 1 - window) / kPageTokens : 0;
    const int64_t columns = divided(last, kPageTokens) * kPageTokens - first * kPageTokens;
    const int64_t key_page = E * kPageTokens, value_page = kPageTokens * width;  // of one head
    static thread_local std::vector<T> turned;
    static thread_local std::vector<A> scores, sums, result;
    turned.resize(heads * M * E);
    scores.resize(heads * M * columns);
    sums.resize(heads * M);
    result.assign(heads * M * width, A(0));

    const T* from = qkv + (row.token + run.from) * stride + head * G * E;
    for (int64_t h = 0; h < heads * G; ++h) {
      kernels<T>().rope(from + h * E, stride, cos + position * (E / 2), sin + position * (E / 2), A(1), n, 1, E,
                        turned.data() + h * n * E, E);
    }
    const auto page_at = [&](int64_t column) { return row.pages[first + column / kPageTokens] * K + head; };
    for (int64_t column = 0; column < columns; column += kPageTokens) {
      const T* page = cache.keys + page_at(column) * key_page;
      for (int64_t h = 0; h < heads; ++h) {
        kernels<T>().page_scores(turned.data() + h * M * E, E, M, page + h * key_page, E,
                                 scores.data() + h * M * columns + column, columns);
      }
    }
    const A scale = static_cast<A>(1 / std::sqrt(static_cast<double>(E)));
    kernels<A>().attention_softmax(scores.data(), heads * M, columns, n, position + 1 - first * kPageTokens, window,
                                   scale, sums.data());
    for (int64_t column = 0; column < columns; column += kPageTokens) {
      const T* page = cache.values + page_at(column) * value_page;
      const int64_t held = std::min(kPageTokens, last - (first * kPageTokens + column));
      for (int64_t h = 0; h < heads; ++h) {
        kernels<T>().page_values(scores.data() + h * M * columns + column, columns, M, page + h * value_page, width,
                                 held, result.data() + h * M * width);
      }
    }
    if (!claim()) return;
    for (int64_t h = 0; h < heads * G; ++h) {
      for (int64_t i = 0; i < n; ++i) {
        T* to = out + ((row.token + run.from + i) * H + head * G + h) * E;
        kernels<T>().round(result.data() + (h * n + i) * width, E, to);
      }
    }
  }

  // normed = norm(x + addend), and total that sum; norm(x) without an addend. `bytes`: normed in 8 bits, where wanted.
  void norm(Member& member, const T* x, const T* addend, const A* weight, T* total, T* normed, A* rstd,
            const Int8Rows* bytes) const {
    member.by_turns(divided(N, kNormed), [&](int64_t turn) {
      const int64_t first = turn * kNormed, count = std::min(N, first + kNormed) - first, at = first * D;
      kernels<T>().rms_norm(addend ? addend + at : x + at, addend ? x + at : nullptr, weight, eps, count, D, normed + at,
                            addend ? total + at : nullptr, rstd + first);
      if (bytes) quantise(normed, first, count, D, *bytes);
    });
  }
};

}  // namespace

Tensor packed_linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& scales, int64_t out_features,
                     bool wide_out) {
  const Check check{"packed_linear"};
  check.floats(x, "x", 2, "(N, K)");
  check_decode_type(check, x, "x");
  const int64_t N = x.size(0), K = x.size(1);
  check_packed(check, packed, scales ? &*scales : nullptr, out_features, K, x.scalar_type());
  const Tensor from = x.contiguous();
  const Tensor y = at::empty({N, out_features}, wide_out ? x.options().dtype(at::kFloat) : x.options());
  with_decode_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const Int8Buffer bytes(scales ? N : 0, K);
    const auto into = [&](Member& member, auto* to) {
      if (!scales) return product(member, data<T>(from), N, packed, out_features, to);
      quantise(member, data<T>(from), N, K, bytes.rows);
      product(member, bytes.rows, N, packed, *scales, out_features, to);
    };
    together(2, [&](Member& member) {
      if (wide_out) into(member, data<float>(y));
      else into(member, data<T>(y));
    });
  });
  return y;
}

// The caller's work alone: a few kilobytes. OpenMP's threads, once called, would spin on the cores that the step needs.
Tensor packed_rows(const Tensor& packed, const Tensor& ids) {
  const Check check{"packed_rows"};
  check.floats(packed, "packed", 3, "(panels, K, 32)");
  check_decode_type(check, packed, "packed");
  check.shape(packed, "packed", {packed.size(0), packed.size(1), kPanel}, "(panels, K, 32)");
  check.shape(ids, "ids", {ids.size(0)}, "(N,)");
  check.dtype(ids, "ids", at::kLong);
  const int64_t N = ids.size(0), words = packed.size(1) * packed.element_size() / 4;
  const Tensor weight = packed.contiguous(), wanted = ids.contiguous();
  const Tensor out = at::empty({N, packed.size(1)}, packed.options());
  for (int64_t n = 0; n < N; ++n) {
    const int64_t id = data<int64_t>(wanted)[n];
    TORCH_CHECK_VALUE(id >= 0 && id < packed.size(0) * kPanel, check.op, ": id ", id, " of ",
                      packed.size(0) * kPanel);
    const int32_t* from = data<int32_t>(weight) + id / kPanel * words * kPanel + id % kPanel;
    int32_t* to = data<int32_t>(out) + n * words;
    for (int64_t word = 0; word < words; ++word) to[word] = from[word * kPanel];
  }
  return out;
}

std::tuple<Tensor, Tensor> quantise(const Tensor& x) {
  const Check check{"quantise"};
  check.floats(x, "x", 2, "(N, K)");
  check_decode_type(check, x, "x");
  const int64_t N = x.size(0), K = x.size(1), groups = divided(K, kGroup);
  const Tensor from = x.contiguous();
  const Int8Buffer bytes(N, K);
  with_decode_type(x.scalar_type(), [&]<class T>(T) {
    together(1, [&](Member& member) { quantise(member, data<T>(from), N, K, bytes.rows); });
  });
  const Tensor scales = at::empty({N, groups}, at::kFloat);
  for (int64_t i = 0; i < N * groups; ++i) data<float>(scales)[i] = bytes.rows.groups[i].scale;
  return {bytes.q, scales};
}

Tensor decode_layers(
    const Tensor& x, at::TensorList weights, at::TensorList scales, at::TensorList norms, const Tensor& keys, const Tensor& values,
    const Tensor& rows, const Tensor& pages, const Tensor& cos, const Tensor& sin, int64_t heads,
    int64_t intermediate, std::optional<int64_t> window, double eps) {
  const Check check{"decode_layers"};
  check.floats(x, "x", 2, "(N, D)");
  check_decode_type(check, x, "x");
  const int64_t layers = weights.size() / 4, N = x.size(0), D = x.size(1);
  TORCH_CHECK_VALUE(weights.size() == size_t(4 * layers) && norms.size() == size_t(2 * layers + 1), check.op, ": got ",
                    weights.size(), " weights and ", norms.size(), " norms, expected 4 and 2 a layer, and a last norm");
  TORCH_CHECK_VALUE(scales.empty() || scales.size() == weights.size(), check.op, ": got ", scales.size(), " scales of ",
                    weights.size(), " weights");
  check.floats(keys, "keys", 5, "(L, pages, K, E, 16)");
  check.floats(values, "values", 5, "(L, pages, K, 16, E')");
  const int64_t K = keys.size(2), E = keys.size(3), H = heads, F = intermediate;
  check.shape(keys, "keys", {layers, keys.size(1), K, E, kPageTokens}, "(L, pages, K, E, 16)");
  check.shape(values, "values", {layers, keys.size(1), K, kPageTokens, rounded(E)}, "(L, pages, K, 16, E')");
  for (const Tensor* cache : {&keys, &values}) {
    check.dtype(*cache, "the cache", x.scalar_type());
    TORCH_CHECK_VALUE(cache->is_contiguous(), check.op, ": the cache must be contiguous");
  }
  TORCH_CHECK_VALUE(K > 0 && H % K == 0 && E % 2 == 0 && D % 2 == 0 && F % 2 == 0, check.op, ": ", H, " heads, ", K,
                    " key/value heads of width ", E, ", hidden width ", D, ", feed-forward width ", F);
  check.shape(pages, "pages", {rows.size(0), pages.size(1)}, "(R, P)");
  check.dtype(pages, "pages", at::kInt);
  check.shape(rows, "rows", {rows.size(0), 2}, "(R, 2)");
  check.dtype(rows, "rows", at::kLong);
  for (const Tensor* table : {&cos, &sin}) {
    check.shape(*table, "cos and sin", {cos.size(0), E / 2}, "(positions, E/2)");
    check.dtype(*table, "cos and sin", at::kFloat);
  }
  for (int64_t i = 0; i < layers; ++i) {
    const int64_t outs[] = {(H + 2 * K) * E, D, 2 * F, D}, ins[] = {D, H * E, D, F};
    for (int64_t j = 0; j < 4; ++j) {
      const Tensor* scale = scales.empty() ? nullptr : &scales[4 * i + j];
      check_packed(check, weights[4 * i + j], scale, outs[j], ins[j], x.scalar_type());
    }
  }
  for (const Tensor& norm : norms) {
    check.shape(norm, "a norm", {D}, "(D,)");
    check.dtype(norm, "a norm", at::kFloat);
  }
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  const Tensor table = rows.contiguous(), page_table = pages.contiguous(), c = cos.contiguous(), s = sin.contiguous();
  const Tensor first = x.contiguous(), out = at::empty_like(first);
  with_decode_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using A = Wide<T>;
    Decoder<T> decoder;
    decoder.N = N, decoder.D = D, decoder.H = H, decoder.K = K, decoder.E = E, decoder.width = rounded(E);
    decoder.window = window.value_or(std::numeric_limits<int64_t>::max());
    decoder.eps = static_cast<A>(eps);
    decoder.cos = data<A>(c), decoder.sin = data<A>(s);
    int64_t token = 0;
    for (int64_t r = 0; r < table.size(0); ++r) {
      const int64_t count = data<int64_t>(table)[2 * r], held = data<int64_t>(table)[2 * r + 1];
      const int32_t* own = data<int32_t>(page_table) + r * page_table.size(1);
      const int64_t needed = divided(held + count, kPageTokens);
      TORCH_CHECK_VALUE(count > 0 && held >= 0 && held + count <= c.size(0) && needed <= page_table.size(1), check.op,
                        ": row ", r, " adds ", count, " tokens to ", held, "; there are ", c.size(0), " positions and ",
                        page_table.size(1), " pages");
      for (int64_t i = 0; i < needed; ++i) {
        TORCH_CHECK_VALUE(own[i] >= 0 && own[i] < keys.size(1), check.op, ": row ", r, " has page ", own[i], " of ",
                          keys.size(1));
      }
      decoder.rows.push_back({token, count, held, own});
      token += count;
    }
    TORCH_CHECK_VALUE(token == N, check.op, ": the rows have ", token, " tokens, x has ", N);
    for (const Row& row : decoder.rows) {
      const int64_t heads = row.count > kQueries ? 1 : K;
      for (int64_t head = 0; head < K; head += heads) decoder.puts.push_back({&row, head, head + heads});
      for (int64_t from = 0; from < row.count; from += kQueries) {
        decoder.runs.push_back({&row, from, std::min(row.count, from + kQueries)});
      }
    }
    std::stable_sort(decoder.runs.begin(), decoder.runs.end(),
                     [](const Run& a, const Run& b) { return a.cost() > b.cost(); });
    // Single tokens wait for memory: all their heads together, unless the threads would have too little to share.
    const bool many = int64_t(decoder.runs.size()) >= 4 * threads_of_a_region();
    for (const Run& run : decoder.runs) {
      const int64_t heads = many && run.to - run.from == 1 ? K : 1;
      for (int64_t head = 0; head < K; head += heads) decoder.tasks.push_back({&run, head, head + heads});
    }

    const auto buffer = [&](int64_t wide_of) { return at::empty({N, wide_of}, first.options()); };
    const Tensor totals[] = {buffer(D), buffer(D)};
    const Tensor normed_of = buffer(D), qkv_of = buffer((H + 2 * K) * E), attended_of = buffer(H * E);
    const Tensor added_of = buffer(D), gate_up_of = buffer(2 * F), gated_of = buffer(F);
    const Tensor rstd = at::empty({N}, first.options().dtype(at::kFloat));
    T *const normed = data<T>(normed_of), *const qkv = data<T>(qkv_of), *const attended = data<T>(attended_of);
    T *const added = data<T>(added_of), *const gate_up = data<T>(gate_up_of), *const gated = data<T>(gated_of);
    const bool in_bytes = !scales.empty();
    // What the next product reads, in 8 bits: norms and gates leave it there as they are made.
    const Int8Buffer buffer_of_bytes(in_bytes ? N : 0, std::max({D, H * E, F}));
    const Int8Rows* bytes = in_bytes ? &buffer_of_bytes.rows : nullptr;
    const auto product_of = [&](Member& member, const T* from, int64_t index, int64_t outs, T* to) {
      if (bytes) product(member, *bytes, N, weights[index], scales[index], outs, to);
      else product(member, from, N, weights[index], outs, to);
    };
    constexpr int64_t kPartsOfLayer = 10;
    together(kPartsOfLayer * layers + 1, [&](Member& member) {
      // Each norm takes in what the part before it adds to the stream.
      const T* stream = data<T>(first);
      int sums = 0;
      const auto norm = [&](int64_t index, bool adds, T* to, const Int8Rows* to_bytes) {
        LDALIGN_PART(member, "rms_norm");
        T* sum = data<T>(totals[sums % 2]);
        decoder.norm(member, stream, adds ? added : nullptr, data<A>(norms[index]), sum, to, data<A>(rstd),
                     to_bytes);
        if (adds) stream = sum, ++sums;
      };
      for (int64_t layer = 0; layer < layers; ++layer) {
        const typename Decoder<T>::Cache cache{data<T>(keys) + layer * keys.stride(0),
                                               data<T>(values) + layer * values.stride(0)};
        norm(2 * layer, layer > 0, normed, bytes);
        {
          LDALIGN_PART(member, "attention");
          product_of(member, normed, 4 * layer, (H + 2 * K) * E, qkv);
          member.by_turns(int64_t(decoder.puts.size()), [&](int64_t i) {
            const Put& put = decoder.puts[i];
            for (int64_t head = put.head; head < put.until; ++head) decoder.put(cache, qkv, *put.row, head);
          });
          member.by_turns_claimed(int64_t(decoder.tasks.size()), [&](int64_t i, const auto& claim) {
            decoder.attend(cache, qkv, decoder.tasks[i], attended, claim);
          });
          if (bytes) quantise(member, attended, N, H * E, *bytes);
          product_of(member, attended, 4 * layer + 1, D, added);
        }
        norm(2 * layer + 1, true, normed, bytes);
        {
          LDALIGN_PART(member, "mlp");
          product_of(member, normed, 4 * layer + 2, 2 * F, gate_up);
          {
            LDALIGN_PART(member, "swiglu");
            member.by_turns(divided(N, kGated), [&](int64_t turn) {
              const int64_t begin = turn * kGated, count = std::min(N, begin + kGated) - begin;
              kernels<T>().swiglu(gate_up + begin * 2 * F, count, 2 * F, F, gated + begin * F);
              if (bytes) quantise(gated, begin, count, F, *bytes);
            });
          }
          product_of(member, gated, 4 * layer + 3, D, added);
        }
      }
      norm(2 * layers, layers > 0, data<T>(out), nullptr);
    });
  });
  return out;
}

}  // namespace ldalign::cpu
