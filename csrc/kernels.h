// The row kernels: what every instruction set offers, as a table of functions a storage type.
//
// N rows, D width, V vocabulary, H heads, E head width. T is the storage type; sums, exponentials and scales are kept
// in Wide<T>, float or double, and rounded once, at the store. The kernels are serial and know nothing of torch: the
// callers (head.cpp, block.cpp) cut the rows among threads.
#pragma once

#include <cstdint>

namespace ldalign::cpu {

struct bf16 {
  uint16_t bits;
};
struct half {
  uint16_t bits;
};

template <class T>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};
template <class T>
using Wide = typename WideOf<T>::type;

// One step of an optimizer: AdamW (Loshchilov and Hutter, arXiv 1711.05101) or RMSprop.
struct Update {
  float learning_rate, decay;      // decay: of the weights, 0 for none
  float momentum, smoothing, eps;  // shares of the old averages of the gradient (AdamW) and of its square
  float first, second;             // what the averages are divided by, having begun at 0; 1 for RMSprop
  uint32_t seed;                   // of the random bits that 16-bit values are rounded with
};

// A group of values as 8-bit integers q in [-127, 127]: q scale, to rounding. `offset` is -128 times the sum of q.
struct Quantised {
  float scale;
  int32_t offset;
};

constexpr int64_t kAlign = 16;  // values: a multiple of every vector's width
constexpr int64_t kPanel = 32;  // rows of a weight that are packed together
constexpr int64_t kPageTokens = 16;  // of a page of the key/value cache
constexpr int64_t kGroup = 64;  // 8-bit values of a row that have one scale

template <class T>
struct Kernels {
  using A = Wide<T>;

  // logits z (rows, V), target (rows,) -> log softmax(z)[target] and the log-sum-exp; both 0 where target is `ignored`.
  void (*logprob)(const T* z, int64_t rows, int64_t V, const int64_t* target, int64_t ignored, A* logp, A* lse);

  // In place: z = scale * (onehot(target) - softmax(z)), the gradient of scale * logp. A row whose scale is 0 becomes
  // 0, whatever its target and lse are: ignored rows have neither.
  void (*logit_gradient)(T* z, int64_t rows, int64_t V, const int64_t* target, const A* lse, const A* scale);

  // One term of a sum kept in 24 bits a value (see WeightGradient in head.cpp): (high, low) = product on the first
  // term, += product later; with the last term the sum is rounded to T, into `high`. Only of the 16-bit types.
  void (*accumulate)(const T* product, int64_t n, bool first, bool last, T* high, uint8_t* low);

  // y = x * rstd * weight, rstd = 1 / sqrt(mean(x^2) + eps). With a residual, x is total = x + residual, rounded to T.
  void (*rms_norm)(const T* x, const T* residual, const A* weight, A eps, int64_t rows, int64_t D, T* y, T* total,
                   A* rstd);

  // With g = dy weight: dx = rstd (g - x rstd^2 mean(g x)) + dtotal (may be null), and
  // dweight (D,) += sum over rows of dy x rstd.
  void (*rms_norm_backward)(const T* dy, const T* dtotal, const T* x, const A* weight, const A* rstd, int64_t rows,
                            int64_t D, T* dx, A* dweight);

  // Turns (x[e], x[e + E/2]) by the angle of (cos[e], sin[e]) in H heads of each row; sign -1 turns back. y may be x.
  void (*rope)(const T* x, int64_t ldx, const A* cos, const A* sin, A sign, int64_t rows, int64_t H, int64_t E, T* y,
               int64_t ldy);

  // gate_up (rows, 2 D): a row's gates, then its ups -> silu(gate) up (rows, D); and the gradient, laid out alike.
  void (*swiglu)(const T* gate_up, int64_t rows, int64_t stride, int64_t D, T* y);
  void (*swiglu_backward)(const T* dy, const T* gate_up, int64_t rows, int64_t stride, int64_t D, T* dgate_up);

  // Attention scores z (rows, columns) of rows / tokens heads with `tokens` queries each. Query i sees the columns
  // [seen + i - window, seen + i). In place: z = softmax(scale z) over those, 0 elsewhere; lse (rows,). Only of float
  // and double: z holds the exponentials before they are divided.
  void (*attention_softmax)(T* z, int64_t rows, int64_t columns, int64_t tokens, int64_t seen, int64_t window, A scale,
                            A* lse);
  // In place: the scores z become the probabilities p = exp(scale z - lse) again, and their gradient dp becomes the
  // scores', scale p (dp - delta); 0 where nothing is seen.
  void (*attention_gradient)(T* z, T* dp, int64_t rows, int64_t columns, int64_t tokens, int64_t seen, int64_t window,
                             A scale, const A* lse, const A* delta);

  // c (M, N) = a b, or += with `add`: a(i, k) at a[i row + k column], b and c with rows of ldb and ldc values. N is a
  // multiple of kAlign. Only of float and double.
  void (*product)(const A* a, int64_t row, int64_t column, const A* b, int64_t ldb, int64_t M, int64_t N, int64_t K,
                  bool add, A* c, int64_t ldc);

  // Generation, only of float and bf16. x (rows, K) against rows [32 first, 32 last) of a weight (N, K), in panels:
  // packed[panel][word][32 rows], a word being 4 bytes along K. Into the columns of y, rounded or wide.
  void (*packed_product)(const T* x, int64_t ldx, int64_t rows, const T* packed, int64_t K, int64_t N, int64_t first,
                         int64_t last, T* y, int64_t ldy);
  void (*packed_product_wide)(const T* x, int64_t ldx, int64_t rows, const T* packed, int64_t K, int64_t N,
                              int64_t first, int64_t last, A* y, int64_t ldy);
  // x (rows, K) in 8 bits, in groups of 64 values, zeros beyond K: q, rows of ldq bytes, and groups (rows, groups). A
  // group is turned (int8_product.h); with m the largest size then, scale is m / 127, and q is each value times 127 / m,
  // rounded to the nearest, to even. Where 127 / m overflows, below 4e-37, scale and q are 0. A group with NaN or
  // infinity has scale NaN and q 0, which makes its products NaN.
  void (*quantise)(const T* x, int64_t rows, int64_t K, int8_t* q, int64_t ldq, Quantised* groups);
  // packed_product of such rows with a weight in 8 bits, packed alike, K a multiple of 64; scales[panel][group][32 rows].
  // y = sum over the groups in order of (sum of q w) (scale of the weight * scale of x), rounded after each of these
  // operations; the inner sums are exact. So all instruction sets give the same bits.
  void (*packed_product_int8)(const int8_t* q, int64_t ldq, const Quantised* groups, int64_t rows, const int8_t* packed,
                              const float* scales, int64_t K, int64_t N, int64_t first, int64_t last, T* y,
                              int64_t ldy);
  // Scores z (rows, 16 columns) of queries q against a page of keys, page[word of E][16 tokens]; and out (rows, E) +=
  // p (rows, keys) times a page of values, page[token][E]; E a multiple of kAlign there.
  void (*page_scores)(const T* q, int64_t ldq, int64_t rows, const T* page, int64_t E, A* z, int64_t ldz);
  void (*page_values)(const A* p, int64_t ldp, int64_t rows, const T* page, int64_t E, int64_t keys, A* out);

  void (*dot)(const T* x, const T* y, int64_t rows, int64_t D, A* out);  // of each row of x with that of y
  void (*widen)(const T* x, int64_t n, A* y);
  void (*round)(const A* x, int64_t n, T* y);

  // Weights p and averages m, v (of T's gradients; float or, `narrow`, bf16) after one step, in place; `at` is the index
  // of the first value. 16-bit results are rounded up or down at random, by their distance: small steps add up.
  // Only of float and bf16.
  void (*adamw)(T* p, const T* grad, void* m, void* v, bool narrow, int64_t n, int64_t at, const Update& update);
  void (*rmsprop)(T* p, const T* grad, void* v, bool narrow, int64_t n, int64_t at, const Update& update);
};

// One instruction set's kernels.
struct Table {
  Kernels<float> f32;
  Kernels<double> f64;
  Kernels<bf16> b16;
  Kernels<half> f16;
};

// All but the first only on x86-64, the last only by a compiler that knows it.
extern const Table table_default, table_avx2, table_avx512, table_avx512_vnni, table_avx512_bf16, table_amx_bf16;

// The kernels of the chosen instruction set (isa.cpp).
const Table& table();

template <class T>
const Kernels<T>& kernels();
template <>
inline const Kernels<float>& kernels<float>() { return table().f32; }
template <>
inline const Kernels<double>& kernels<double>() { return table().f64; }
template <>
inline const Kernels<bf16>& kernels<bf16>() { return table().b16; }
template <>
inline const Kernels<half>& kernels<half>() { return table().f16; }

}  // namespace ldalign::cpu
