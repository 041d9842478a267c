// The bodies of the row kernels, compiled once for every instruction set by isa_*.cpp. What each function computes is
// said in kernels.h, and derived in docs/kernels.md.
#pragma once

#include "decode_kernels.h"
#include "int8_product.h"
#include "lanes.h"

namespace ldalign::cpu::LDALIGN_ISA {

// Of one row of logits. A block stays in the first-level cache between the search for its largest value and its sum,
// so that memory is read once; the blocks' sums are added in double.
template <class T>
double log_sum_exp(const T* z, int64_t V) {
  using A = Wide<T>;
  using L = Lanes<T>;
  constexpr int64_t kBlock = 4096;
  constexpr int W = width<T>;
  const A least = -__builtin_huge_valf();
  A largest = least;
  double sum = 0;
  for (int64_t start = 0; start < V; start += kBlock) {
    const T* block = z + start;
    const int64_t n = V - start < kBlock ? V - start : kBlock;
    L most[4] = {splat(least), splat(least), splat(least), splat(least)};  // four chains: one would wait for itself
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W) {
      for (int k = 0; k < 4; ++k) most[k] = larger(most[k], load(block + i + k * W, Whole{}));
    }
    sweep<T>(n - i, [&](int64_t j, auto count) LDALIGN_LAMBDA {
      most[0] = larger(most[0], load(block + i + j, count, least));
    });
    const A here = largest_of(larger(larger(most[0], most[1]), larger(most[2], most[3])));
    if (here > largest) {
      sum *= __builtin_exp(static_cast<double>(largest) - here);
      largest = here;
    }
    const L shift = splat(largest == least ? A(0) : largest);  // all -inf, or NaN: no -inf - -inf
    L partial = splat(A(0));
    sweep<T>(n, [&](int64_t j, auto count) LDALIGN_LAMBDA { partial += exp(load(block + j, count, least) - shift); });
    sum += total(partial);
  }
  return largest + __builtin_log(sum);
}

template <class T>
void logprob(const T* z, int64_t rows, int64_t V, const int64_t* target, int64_t ignored, Wide<T>* logp, Wide<T>* lse) {
  for (int64_t row = 0; row < rows; ++row, z += V) {
    if (target[row] == ignored) {
      logp[row] = lse[row] = 0;
      continue;
    }
    const double whole = log_sum_exp(z, V);
    lse[row] = static_cast<Wide<T>>(whole);
    logp[row] = static_cast<Wide<T>>(value_of(z[target[row]]) - whole);
  }
}

template <class T>
void logit_gradient(T* z, int64_t rows, int64_t V, const int64_t* target, const Wide<T>* lse, const Wide<T>* scale) {
  using L = Lanes<T>;
  for (int64_t row = 0; row < rows; ++row, z += V) {
    if (scale[row] == 0) {
      __builtin_memset(z, 0, V * sizeof(T));
      continue;
    }
    // 1 - p by expm1: where p is near 1 the difference would lose its digits.
    const double target_gradient = scale[row] * -__builtin_expm1(double(value_of(z[target[row]])) - lse[row]);
    const L shift = splat(lse[row]), minus = splat(-scale[row]);
    sweep<T>(V, [&](int64_t i, auto count) LDALIGN_LAMBDA {
      store(z + i, minus * exp(load(z + i, count) - shift), count);
    });
    z[target[row]] = round_to<T>(static_cast<Wide<T>>(target_gradient));
  }
}

// The upper 24 bits of a float: 16 in `high` (whatever T is), 8 in `low`, rounded to nearest even.
template <class T>
void accumulate(const T* product, int64_t n, bool first, bool last, T* high, uint8_t* low) {
  sweep<T>(n, [&](int64_t i, auto count) LDALIGN_LAMBDA {
    const int64_t lanes = lanes_of(count);
    F32 sum = load(product + i, count);
    U16 upper = {};
    U8 lower = {};
    if (!first) {
      __builtin_memcpy(&upper, high + i, lanes * sizeof upper[0]);
      __builtin_memcpy(&lower, low + i, lanes * sizeof lower[0]);
      sum += (F32)(__builtin_convertvector(upper, U32) << 16 | __builtin_convertvector(lower, U32) << 8);
    }
    if (last) {
      store(high + i, sum, count);
      return;
    }
    const U32 bits = (U32)sum;
    const U32 rounded = sum == sum ? bits + 0x7Fu + ((bits >> 8) & 1u) : bits | 0x00400000u;
    upper = __builtin_convertvector(rounded >> 16, U16);
    lower = __builtin_convertvector(rounded >> 8, U8);
    __builtin_memcpy(high + i, &upper, lanes * sizeof upper[0]);
    __builtin_memcpy(low + i, &lower, lanes * sizeof lower[0]);
  });
}

template <class T>
void rms_norm(const T* x, const T* residual, const Wide<T>* weight, Wide<T> eps, int64_t rows, int64_t D, T* y,
              T* total_out, Wide<T>* rstd) {
  using L = Lanes<T>;
  for (int64_t row = 0; row < rows; ++row, x += D, y += D) {
    L squares = splat(Wide<T>(0));
    if (residual) {
      sweep<T>(D, [&](int64_t i, auto count) LDALIGN_LAMBDA {
        const Raw<T> rounded = narrow<T>(load(x + i, count) + load(residual + i, count));
        const L value = widen<T>(rounded);
        store(total_out + i, value, count);
        squares += value * value;
      });
    } else {
      sweep<T>(D, [&](int64_t i, auto count) LDALIGN_LAMBDA {
        const L value = load(x + i, count);
        squares += value * value;
      });
    }
    const T* normed = residual ? total_out : x;
    rstd[row] = static_cast<Wide<T>>(1 / __builtin_sqrt(total(squares) / D + eps));
    const L scale = splat(rstd[row]);
    sweep<T>(D, [&](int64_t i, auto count) LDALIGN_LAMBDA {
      store(y + i, load(normed + i, count) * scale * load(weight + i, count), count);
    });
    if (residual) residual += D, total_out += D;
  }
}

template <class T>
void rms_norm_backward(const T* dy, const T* dtotal, const T* x, const Wide<T>* weight, const Wide<T>* rstd,
                       int64_t rows, int64_t D, T* dx, Wide<T>* dweight) {
  using L = Lanes<T>;
  for (int64_t row = 0; row < rows; ++row, dy += D, x += D, dx += D) {
    L dot = splat(Wide<T>(0));
    sweep<T>(D, [&](int64_t i, auto count) LDALIGN_LAMBDA {
      dot += load(dy + i, count) * load(weight + i, count) * load(x + i, count);
    });
    const double r = rstd[row];
    const L scale = splat(rstd[row]), inward = splat(static_cast<Wide<T>>(r * r * total(dot) / D));
    sweep<T>(D, [&](int64_t i, auto count) LDALIGN_LAMBDA {
      const L grad = load(dy + i, count), value = load(x + i, count);
      L out = scale * (grad * load(weight + i, count) - value * inward);
      if (dtotal) out += load(dtotal + i, count);
      store(dx + i, out, count);
      store(dweight + i, load(dweight + i, count) + grad * (value * scale), count);
    });
    if (dtotal) dtotal += D;
  }
}

template <class T>
void rope(const T* x, int64_t ldx, const Wide<T>* cos, const Wide<T>* sin, Wide<T> sign, int64_t rows, int64_t H,
          int64_t E, T* y, int64_t ldy) {
  const int64_t half_width = E / 2;
  for (int64_t row = 0; row < rows; ++row, x += ldx, y += ldy, cos += half_width, sin += half_width) {
    for (int64_t head = 0; head < H; ++head) {
      const T* a = x + head * E;
      T* b = y + head * E;
      sweep<T>(half_width, [&](int64_t i, auto count) LDALIGN_LAMBDA {
        const Lanes<T> left = load(a + i, count), right = load(a + half_width + i, count);
        const Lanes<T> c = load(cos + i, count), s = load(sin + i, count) * sign;
        store(b + i, left * c - right * s, count);
        store(b + half_width + i, right * c + left * s, count);
      });
    }
  }
}

template <class T>
void swiglu(const T* gate_up, int64_t rows, int64_t stride, int64_t D, T* y) {
  for (int64_t row = 0; row < rows; ++row, gate_up += stride, y += D) {
    sweep<T>(D, [&](int64_t i, auto count) LDALIGN_LAMBDA {
      const Lanes<T> g = load(gate_up + i, count);
      store(y + i, g / (Wide<T>(1) + exp(-g)) * load(gate_up + D + i, count), count);
    });
  }
}

template <class T>
void swiglu_backward(const T* dy, const T* gate_up, int64_t rows, int64_t stride, int64_t D, T* dgate_up) {
  for (int64_t row = 0; row < rows; ++row, dy += D, gate_up += stride, dgate_up += 2 * D) {
    sweep<T>(D, [&](int64_t i, auto count) LDALIGN_LAMBDA {
      const Lanes<T> grad = load(dy + i, count), g = load(gate_up + i, count);
      const Lanes<T> s = Wide<T>(1) / (Wide<T>(1) + exp(-g));
      store(dgate_up + D + i, grad * g * s, count);
      store(dgate_up + i, grad * load(gate_up + D + i, count) * s * (Wide<T>(1) + g * (Wide<T>(1) - s)), count);
    });
  }
}

// The columns that query `row` of a tile sees: [first, last).
struct Sight {
  int64_t first, last;
  Sight(int64_t row, int64_t tokens, int64_t seen, int64_t window) {
    last = seen + row % tokens;
    first = last > window ? last - window : 0;
  }
};

template <class T>
void zero_outside(T* z, const Sight& sight, int64_t columns) {
  __builtin_memset(z, 0, sight.first * sizeof(T));
  __builtin_memset(z + sight.last, 0, (columns - sight.last) * sizeof(T));
}

template <class T>
void attention_softmax(T* z, int64_t rows, int64_t columns, int64_t tokens, int64_t seen, int64_t window, Wide<T> scale,
                       Wide<T>* lse) {
  using L = Lanes<T>;
  const Wide<T> least = -__builtin_huge_valf();
  for (int64_t row = 0; row < rows; ++row, z += columns) {
    const Sight sight(row, tokens, seen, window);
    T* visible = z + sight.first;
    const int64_t n = sight.last - sight.first;
    L most = splat(least);
    sweep<T>(n, [&](int64_t i, auto count) LDALIGN_LAMBDA { most = larger(most, load(visible + i, count, least)); });
    const Wide<T> top = largest_of(most);
    const L shift = splat(top == least ? Wide<T>(0) : top);  // all -inf, or NaN: no -inf - -inf
    L partial = splat(Wide<T>(0));
    sweep<T>(n, [&](int64_t i, auto count) LDALIGN_LAMBDA {
      const L term = exp((load(visible + i, count, least) - shift) * scale);
      partial += term;
      store(visible + i, term, count);
    });
    const double sum = total(partial);
    lse[row] = static_cast<Wide<T>>((top == least ? 0 : double(top)) * scale + __builtin_log(sum));
    const L inverse = splat(static_cast<Wide<T>>(1 / sum));
    sweep<T>(n, [&](int64_t i, auto count) LDALIGN_LAMBDA {
      store(visible + i, load(visible + i, count) * inverse, count);
    });
    zero_outside(z, sight, columns);
  }
}

template <class T>
void attention_gradient(T* z, T* dp, int64_t rows, int64_t columns, int64_t tokens, int64_t seen, int64_t window,
                        Wide<T> scale, const Wide<T>* lse, const Wide<T>* delta) {
  using L = Lanes<T>;
  for (int64_t row = 0; row < rows; ++row, z += columns, dp += columns) {
    const Sight sight(row, tokens, seen, window);
    const L shift = splat(lse[row]), inward = splat(delta[row]);
    T *p = z + sight.first, *ds = dp + sight.first;
    sweep<T>(sight.last - sight.first, [&](int64_t i, auto count) LDALIGN_LAMBDA {
      const L probability = exp(load(p + i, count) * scale - shift);
      store(ds + i, probability * (load(ds + i, count) - inward) * scale, count);
      store(p + i, probability, count);
    });
    zero_outside(z, sight, columns);
    zero_outside(dp, sight, columns);
  }
}

template <class T>
void dot(const T* x, const T* y, int64_t rows, int64_t D, Wide<T>* out) {
  for (int64_t row = 0; row < rows; ++row, x += D, y += D) {
    Lanes<T> sum = splat(Wide<T>(0));
    sweep<T>(D, [&](int64_t i, auto count) LDALIGN_LAMBDA { sum += load(x + i, count) * load(y + i, count); });
    out[row] = static_cast<Wide<T>>(total(sum));
  }
}

template <class T>
void widened(const T* x, int64_t n, Wide<T>* y) {
  sweep<T>(n, [&](int64_t i, auto count) LDALIGN_LAMBDA { store(y + i, load(x + i, count), count); });
}

// R rows and V vectors of a product, all in registers.
template <class A, int R, int V>
LDALIGN_INLINE void product_block(const A* a, int64_t row, int64_t column, const A* b, int64_t ldb, int64_t K, bool add,
                                  A* c, int64_t ldc) {
  Lanes<A> sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[r][v] = add ? load(c + r * ldc + v * width<A>, Whole{}) : splat(A(0));
  }
  for (int64_t k = 0; k < K; ++k, a += column, b += ldb) {
    Lanes<A> right[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) right[v] = load(b + v * width<A>, Whole{});
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Lanes<A> left = splat(a[r * row]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] += left * right[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(c + r * ldc + v * width<A>, sum[r][v], Whole{});
  }
}

template <class A, int V>
void product_columns(const A* a, int64_t row, int64_t column, const A* b, int64_t ldb, int64_t M, int64_t K, bool add,
                     A* c, int64_t ldc) {
  int64_t i = 0;
  for (; i + 6 <= M; i += 6) product_block<A, 6, V>(a + i * row, row, column, b, ldb, K, add, c + i * ldc, ldc);
  for (; i < M; ++i) product_block<A, 1, V>(a + i * row, row, column, b, ldb, K, add, c + i * ldc, ldc);
}

template <class A>
void product(const A* a, int64_t row, int64_t column, const A* b, int64_t ldb, int64_t M, int64_t N, int64_t K, bool add,
             A* c, int64_t ldc) {
  constexpr int V = kLanes == 16 ? 4 : 2;  // with six rows, as many sums as there are registers
  constexpr int W = width<A>;
  int64_t j = 0;
  for (; j + V * W <= N; j += V * W) product_columns<A, V>(a, row, column, b + j, ldb, M, K, add, c + j, ldc);
  for (; j < N; j += W) product_columns<A, 1>(a, row, column, b + j, ldb, M, K, add, c + j, ldc);
}

template <class T>
void round(const Wide<T>* x, int64_t n, T* y) {
  sweep<T>(n, [&](int64_t i, auto count) LDALIGN_LAMBDA { store(y + i, load(x + i, count), count); });
}

template <class T>
constexpr bool is_float_or_bf16 = false;
template <>
constexpr bool is_float_or_bf16<float> = true;
template <>
constexpr bool is_float_or_bf16<bf16> = true;

// 32 random bits for each of the values from `index` on: MurmurHash3's finalizer of the index, keyed by the seed.
LDALIGN_INLINE U32 random_bits(int64_t index, uint32_t seed) {
  U32 h = (uint32_t)index * 0x9E3779B9u + seed - U32{};
  for (int lane = 0; lane < kLanes; ++lane) h[lane] += lane * 0x9E3779B9u;
  h = (h ^ (h >> 16)) * 0x85EBCA6Bu;
  h = (h ^ (h >> 13)) * 0xC2B2AE35u;
  return h ^ (h >> 16);
}

// value, to be rounded at the store: adding 16 random bits below those that stay makes truncation random rounding.
template <class T>
LDALIGN_INLINE F32 dither(F32 value, U32 random) {
  if constexpr (sizeof(T) == 4) return value;
  const U32 bits = (U32)value;
  const U32 up = (bits + (random & 0xFFFFu)) & 0xFFFF0000u;
  return (F32)((bits & 0x7F800000u) == 0x7F800000u ? bits : up);  // infinite and NaN stay
}

template <class T, class S>
void adamw_of(T* p, const T* grad, S* m, S* v, int64_t n, int64_t at, const Update& u) {
  const float keep = 1 - u.learning_rate * u.decay, step = u.learning_rate / u.first;
  const float root = 1 / __builtin_sqrtf(u.second);
  sweep<T>(n, [&](int64_t i, auto count) LDALIGN_LAMBDA {
    const F32 g = load(grad + i, count);
    const F32 mean = load(m + i, count) * u.momentum + g * (1 - u.momentum);
    const F32 square = load(v + i, count) * u.smoothing + g * g * (1 - u.smoothing);
    F32 size;
    for (int lane = 0; lane < kLanes; ++lane) size[lane] = __builtin_sqrtf(square[lane]);
    const F32 value = load(p + i, count) * keep - step * mean / (size * root + u.eps);
    const U32 random = random_bits(at + i, u.seed);
    store(p + i, dither<T>(value, random), count);
    store(m + i, dither<S>(mean, random >> 16), count);
    store(v + i, dither<S>(square, random >> 8), count);
  });
}

template <class T, class S>
void rmsprop_of(T* p, const T* grad, S* v, int64_t n, int64_t at, const Update& u) {
  sweep<T>(n, [&](int64_t i, auto count) LDALIGN_LAMBDA {
    const F32 old = load(p + i, count), g = load(grad + i, count) + old * u.decay;
    const F32 square = load(v + i, count) * u.smoothing + g * g * (1 - u.smoothing);
    F32 size;
    for (int lane = 0; lane < kLanes; ++lane) size[lane] = __builtin_sqrtf(square[lane]);
    const U32 random = random_bits(at + i, u.seed);
    store(p + i, dither<T>(old - u.learning_rate * g / (size + u.eps), random), count);
    store(v + i, dither<S>(square, random >> 16), count);
  });
}

template <class T>
void adamw(T* p, const T* grad, void* m, void* v, bool narrow, int64_t n, int64_t at, const Update& u) {
  if (narrow) return adamw_of(p, grad, static_cast<bf16*>(m), static_cast<bf16*>(v), n, at, u);
  adamw_of(p, grad, static_cast<float*>(m), static_cast<float*>(v), n, at, u);
}

template <class T>
void rmsprop(T* p, const T* grad, void* v, bool narrow, int64_t n, int64_t at, const Update& u) {
  if (narrow) return rmsprop_of(p, grad, static_cast<bf16*>(v), n, at, u);
  rmsprop_of(p, grad, static_cast<float*>(v), n, at, u);
}

template <class T>
constexpr Kernels<T> make() {
  Kernels<T> all = {};
  all.logprob = logprob<T>;
  all.logit_gradient = logit_gradient<T>;
  all.rms_norm = rms_norm<T>;
  all.rms_norm_backward = rms_norm_backward<T>;
  all.rope = rope<T>;
  all.swiglu = swiglu<T>;
  all.swiglu_backward = swiglu_backward<T>;
  all.attention_gradient = attention_gradient<T>;
  all.dot = dot<T>;
  all.widen = widened<T>;
  all.round = round<T>;
  if constexpr (sizeof(T) == 2) all.accumulate = accumulate<T>;
  if constexpr (sizeof(T) > 2) all.attention_softmax = attention_softmax<T>, all.product = product<T>;
  if constexpr (is_float_or_bf16<T>) {
    all.packed_product = packed_product<T, T>;
    all.packed_product_wide = packed_product<T, float>;
    all.quantise = quantise<T>;
    all.packed_product_int8 = packed_product_int8<T>;
    all.page_scores = page_scores<T>;
    all.page_values = page_values<T>;
    all.adamw = adamw<T>;
    all.rmsprop = rmsprop<T>;
  }
  return all;
}

constexpr Table make_table() { return {make<float>(), make<double>(), make<bf16>(), make<half>()}; }

}  // namespace ldalign::cpu::LDALIGN_ISA
