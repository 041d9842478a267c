// The kernels of generation: products with packed weights and attention over cache pages. kernels.h says what each
// computes. Every sum runs in one fixed order, whatever the number of rows: a row's bits do not depend on its company.
//
// A word is 4 bytes along the summed axis: one float, two bf16, or four 8-bit integers (int8_product.h). Packed weights and
// key pages lie word by word.
#pragma once

#include "lanes.h"
namespace ldalign::cpu::LDALIGN_ISA {

template <class T>
constexpr int per_word = 4 / sizeof(T);

LDALIGN_INLINE U32 load_words(const void* from) {
  U32 words;
  __builtin_memcpy(&words, from, sizeof words);
  return words;
}

// Value j of every word.
template <class T>
LDALIGN_INLINE F32 part(U32 words, int j) {
  if constexpr (sizeof(T) == 4) return (F32)words;
  return (F32)(j == 0 ? words << 16 : words & 0xFFFF0000u);
}

// One word of x in all lanes, as `multiply_add` wants it.
template <class T>
struct Spread {
  F32 parts[per_word<T>];
  explicit LDALIGN_INLINE Spread(const T* x) {
    uint32_t word;
    __builtin_memcpy(&word, x, sizeof word);
    const U32 words = word - U32{};
    for (int j = 0; j < per_word<T>; ++j) parts[j] = part<T>(words, j);
  }
  LDALIGN_INLINE void multiply_add(U32 words, F32& sum) const {
    for (int j = 0; j < per_word<T>; ++j) sum += parts[j] * part<T>(words, j);
  }
};

#ifdef LDALIGN_BF16_DOT
template <>
struct Spread<bf16> {
  U32 words;
  explicit LDALIGN_INLINE Spread(const bf16* x) {
    uint32_t word;
    __builtin_memcpy(&word, x, sizeof word);
    words = word - U32{};
  }
  LDALIGN_INLINE void multiply_add(U32 other, F32& sum) const {
    sum = (F32)_mm512_dpbf16_ps((__m512)sum, (__m512bh)words, (__m512bh)other);
  }
};
#endif

// What is called into the cache while something else is computed: some bytes an iteration. Only a hint, so that it may
// lie beyond what is there. Into the first level, though it is more than that holds: on Zen 4 a hint for the second
// level alone leaves a tenth of a product's time to waiting.
struct Ahead {
  const char* at;
  int64_t step;  // at most two cache lines
  LDALIGN_INLINE void fetch() {
    __builtin_prefetch(at, 0, 3);
    if (step > 64) __builtin_prefetch(at + 64, 0, 3);
    at += step;
  }
};

}  // namespace ldalign::cpu::LDALIGN_ISA

#ifdef LDALIGN_AMX
#include "amx_product.h"
#endif

namespace ldalign::cpu::LDALIGN_ISA {

// R rows against one panel, all sums in registers.
template <class T, class O, int R>
LDALIGN_INLINE void packed_block(const T* x, int64_t ldx, const T* panel, Ahead ahead, int64_t words, int64_t columns,
                                 O* y, int64_t ldy) {
  constexpr int V = kPanel / kLanes;
  F32 sum[R][V] = {};
  for (int64_t k = 0; k < words; ++k, x += per_word<T>, panel += kPanel * per_word<T>) {
    ahead.fetch();
    U32 right[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) right[v] = load_words(panel + v * kLanes * per_word<T>);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Spread<T> left(x + r * ldx);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) left.multiply_add(right[v], sum[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store_left(y + r * ldy + v * kLanes, sum[r][v], columns - v * kLanes);
  }
}

// block(R, row, panel, ahead, its values) for R = rows, which is at most Most: a constant, that sums may be in registers.
template <int Most, class T, class Block>
void with_rows(int64_t rows, int64_t row, int64_t panel, const Ahead& ahead, const T* values, const Block& block) {
  if constexpr (Most > 1) {
    if (rows < Most) return with_rows<Most - 1>(rows, row, panel, ahead, values, block);
  }
  block(std::integral_constant<int, Most>{}, row, panel, ahead, values);
}

// That for the panels [first, last) and, with each, blocks of [row, row + R) of the rows, as even as can be.
template <int Most, class T, class Block>
LDALIGN_INLINE void by_blocks(int64_t rows, const T* packed, int64_t K, int64_t first, int64_t last,
                              const Block& block) {
  const int64_t blocks = (rows + Most - 1) / Most;
  for (int64_t panel = first; panel < last; ++panel) {
    const T* values = packed + panel * kPanel * K;
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t from = rows * i / blocks, to = rows * (i + 1) / blocks;
      // The blocks call the next panel, each its share: one alone would ask for more than the memory gives.
      const char* following = reinterpret_cast<const char*>(values + kPanel * K);
      const Ahead ahead{following + kPanel * K * int64_t(sizeof(T)) * i / blocks, kPanel * 4 / blocks};
      with_rows<Most>(to - from, from, panel, ahead, values, block);
    }
  }
}

template <class T, class O>
void packed_product(const T* x, int64_t ldx, int64_t rows, const T* packed, int64_t K, int64_t N, int64_t first,
                    int64_t last, O* y, int64_t ldy) {
#ifdef LDALIGN_AMX
  if constexpr (std::is_same_v<T, bf16>) return amx_product(x, ldx, rows, packed, K, N, first, last, y, ldy);
#endif
  constexpr int kRows = kLanes == 16 ? 12 : kLanes == 8 ? 2 : 1;  // with a panel's columns, what the registers hold
  by_blocks<kRows>(rows, packed, K, first, last,
                   [&](auto R, int64_t row, int64_t panel, Ahead ahead, const T* values) LDALIGN_LAMBDA {
                     const int64_t column = panel * kPanel;
                     packed_block<T, O, R>(x + row * ldx, ldx, values, ahead, K / per_word<T>, N - column,
                                           y + row * ldy + column, ldy);
                   });
}

// Even and odd words are summed apart: of few rows one sum would wait for itself.
template <class T, int R>
LDALIGN_INLINE void scores_block(const T* q, int64_t ldq, const T* page, int64_t E, float* z, int64_t ldz) {
  constexpr int V = kPageTokens / kLanes, J = per_word<T>;
  F32 sum[2][R][V] = {};
  for (int64_t e = 0; e < E; e += 2 * J, page += 2 * kPageTokens * J) {
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {
      if (odd && e + J == E) break;
      U32 keys[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) keys[v] = load_words(page + (odd * kPageTokens + v * kLanes) * J);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Spread<T> left(q + r * ldq + e + odd * J);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) left.multiply_add(keys[v], sum[odd][r][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(z + r * ldz + v * kLanes, sum[0][r][v] + sum[1][r][v], Whole{});
  }
}

template <class T, int R>
void scores_rows(int64_t rows, const T* q, int64_t ldq, const T* page, int64_t E, float* z, int64_t ldz) {
  if constexpr (R > 1) {
    if (rows < R) return scores_rows<T, R - 1>(rows, q, ldq, page, E, z, ldz);
  }
  scores_block<T, R>(q, ldq, page, E, z, ldz);
}

template <class T>
void page_scores(const T* q, int64_t ldq, int64_t rows, const T* page, int64_t E, float* z, int64_t ldz) {
  constexpr int kRows = kLanes == 16 ? 8 : 1;
  for (int64_t i = 0; i < rows; i += kRows) {
    scores_rows<T, kRows>(rows - i, q + i * ldq, ldq, page, E, z + i * ldz, ldz);
  }
}

template <class T, int R, int V>
LDALIGN_INLINE void values_block(const float* p, int64_t ldp, const T* page, int64_t ld, int64_t keys, float* out,
                                 int64_t ldo) {
  F32 sum[R][V];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[r][v] = load(out + r * ldo + v * kLanes, Whole{});
  }
  for (int64_t j = 0; j < keys; ++j, page += ld) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const F32 values = load(page + v * kLanes, Whole{});
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[r][v] += p[r * ldp + j] * values;
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(out + r * ldo + v * kLanes, sum[r][v], Whole{});
  }
}

template <class T, int V>
void values_columns(const float* p, int64_t ldp, int64_t rows, const T* page, int64_t ld, int64_t keys, float* out,
                    int64_t ldo) {
  constexpr int kRows = kLanes == 16 ? 4 : 2;
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows) values_block<T, kRows, V>(p + i * ldp, ldp, page, ld, keys, out + i * ldo, ldo);
  if (kRows > 2 && i + 2 < rows) values_block<T, 3, V>(p + i * ldp, ldp, page, ld, keys, out + i * ldo, ldo), i += 3;
  for (; i < rows; ++i) values_block<T, 1, V>(p + i * ldp, ldp, page, ld, keys, out + i * ldo, ldo);
}

template <class T>
void page_values(const float* p, int64_t ldp, int64_t rows, const T* page, int64_t E, int64_t keys, float* out) {
  constexpr int V = 4;
  int64_t e = 0;
  for (; e + V * kLanes <= E; e += V * kLanes) {
    values_columns<T, V>(p, ldp, rows, page + e, E, keys, out + e, E);
  }
  for (; e < E; e += kLanes) values_columns<T, 1>(p, ldp, rows, page + e, E, keys, out + e, E);
}

}  // namespace ldalign::cpu::LDALIGN_ISA
