// Products of rows with packed weights, both in 8 bits: kernels.h says what is computed. A weight is quantised once, by the
// same steps in Python (kernels/reference.py), a row as it comes.
//
// Each group of 64 values has one scale, and before that is turned by a Hadamard matrix, whose entries are 1/8 and -1/8:
// the products of turned groups are those of the groups, and a value that is much larger than the others has become 64
// of middling size, which 8 bits hold better (QuaRot, arXiv 2404.00456, turns whole rows).
//
// Instruction sets differ in how they add products of bytes, whose sums are exact. What is scaled is float32, operation
// by operation: fused ones, which some sets lack, would round to other bits.
#pragma once

#include <utility>

#include "decode_kernels.h"

namespace ldalign::cpu::LDALIGN_ISA {

// A product as it is, rounded: it is not fused with the addition that follows.
LDALIGN_INLINE F32 unfused(F32 product) {
#if LDALIGN_VECTOR_BYTES == 64
  asm("" : "+v"(product));
#elif defined(__SSE2__)
  asm("" : "+x"(product));
#elif defined(__aarch64__)
  asm("" : "+w"(product));
#else
  asm("" : "+m"(product));
#endif
  return product;
}

template <int kStride, size_t... lane>
LDALIGN_INLINE F32 swapped(F32 values, std::index_sequence<lane...>) {
#ifdef __clang__
  return __builtin_shufflevector(values, values, (int(lane) ^ kStride)...);
#else
  return __builtin_shuffle(values, I32{(int(lane) ^ kStride)...});
#endif
}

// Sums of the pairs of values that lie kStride apart in their first places, differences in the second; then the same
// with half the stride, down to 1: 8 times the turn.
template <int kStride>
LDALIGN_INLINE void turn(F32 (&values)[kGroup / kLanes]) {
  if constexpr (kStride >= kLanes) {
    constexpr int kApart = kStride / kLanes;
#pragma GCC unroll 16
    for (int i = 0; i < kGroup / kLanes; ++i) {
      if (i & kApart) continue;
      const F32 a = values[i], b = values[i + kApart];
      values[i] = a + b, values[i + kApart] = a - b;
    }
  } else {
    F32 sign;
    for (int lane = 0; lane < kLanes; ++lane) sign[lane] = lane & kStride ? -1.0f : 1.0f;
#pragma GCC unroll 16
    for (int i = 0; i < kGroup / kLanes; ++i) {
      values[i] = values[i] * sign + swapped<kStride>(values[i], std::make_index_sequence<kLanes>{});
    }
  }
  if constexpr (kStride > 1) turn<kStride / 2>(values);
}

// A group of n values, zeros beyond them.
template <class T>
LDALIGN_INLINE Quantised quantise_group(const T* x, int64_t n, int8_t* q) {
  constexpr float kRounding = 0x1.8p23f;  // adding it rounds: the integer is in the lowest bits
  constexpr uint32_t kInfinite = 0x7F800000u, kRoundingBits = 0x4B400000u;
  F32 values[kGroup / kLanes] = {};
  if (n == kGroup) {
#pragma GCC unroll 16
    for (int i = 0; i < kGroup / kLanes; ++i) values[i] = load(x + i * kLanes, Whole{});
  } else {
    sweep<T>(n, [&](int64_t i, auto count) LDALIGN_LAMBDA { values[i / kLanes] = load(x + i, count); });
  }
  turn<kGroup / 2>(values);
  I32 sizes = {};  // as bits, which are in the order of the values, NaN above infinity
#pragma GCC unroll 16
  for (const F32& of : values) sizes = larger(sizes, (I32)((U32)of & 0x7FFFFFFFu));
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits = larger(bits, static_cast<uint32_t>(sizes[lane]));
  float size;
  __builtin_memcpy(&size, &bits, sizeof size);
  const float factor = 127.0f / size;
  if (bits >= kInfinite || factor > __FLT_MAX__) {
    __builtin_memset(q, 0, kGroup);
    return {bits >= kInfinite ? __builtin_nanf("") : 0.0f, 0};
  }
  I32 sums = {};
#pragma GCC unroll 16
  for (int i = 0; i < kGroup / kLanes; ++i) {
    const U32 shifted = (U32)(unfused(values[i] * factor) + kRounding);
    sums += (I32)(shifted - kRoundingBits);
    const U8 bytes = __builtin_convertvector(shifted, U8);
    __builtin_memcpy(q + i * kLanes, &bytes, sizeof bytes);
  }
  int32_t sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += sums[lane];
  return {size / (8 * 127.0f), -128 * sum};
}

template <class T>
void quantise(const T* x, int64_t rows, int64_t K, int8_t* q, int64_t ldq, Quantised* groups) {
  for (int64_t r = 0; r < rows; ++r, x += K, q += ldq) {
    for (int64_t k = 0; k < K; k += kGroup) *groups++ = quantise_group(x + k, K - k < kGroup ? K - k : kGroup, q + k);
  }
}

#ifdef LDALIGN_VNNI
// One instruction adds the four products of unsigned by signed bytes. The weights' bytes w become w + 128 by a change of
// their highest bit; so a sum begins with the row's offset.
struct WeightBytes {
  U32 raised;
  explicit LDALIGN_INLINE WeightBytes(const int8_t* from) : raised(load_words(from) ^ 0x80808080u) {}
};

struct RowBytes {
  int32_t word;
  explicit LDALIGN_INLINE RowBytes(const int8_t* q) { __builtin_memcpy(&word, q, sizeof word); }
  static LDALIGN_INLINE I32 start(const Quantised& group) { return group.offset - I32{}; }
  LDALIGN_INLINE void multiply_add(const WeightBytes& weights, I32& sum) const {
    sum = (I32)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights.raised, _mm512_set1_epi32(word));
  }
};
#else
typedef int16_t I16 __attribute__((vector_size(LDALIGN_VECTOR_BYTES)));

// In each lane of 32 bits the sum of its two products of 16 bits.
LDALIGN_INLINE I32 add_pairs(I16 a, I16 b) {
#if LDALIGN_VECTOR_BYTES == 64
  return (I32)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif LDALIGN_VECTOR_BYTES == 32
  return (I32)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (I32)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  const auto low = [](I16 of) LDALIGN_LAMBDA { return (I32)((U32)of << 16) >> 16; };
  return low(a) * low(b) + ((I32)a >> 16) * ((I32)b >> 16);
#endif
}

// The four bytes of each word, as two pairs of 16 bits: the first and third, the second and fourth.
struct Bytes {
  I16 even, odd;
  explicit LDALIGN_INLINE Bytes(U32 words) : even((I16)((U16Pairs)words << 8) >> 8), odd((I16)words >> 8) {}

 private:
  typedef uint16_t U16Pairs __attribute__((vector_size(LDALIGN_VECTOR_BYTES)));
};

struct WeightBytes : Bytes {
  explicit LDALIGN_INLINE WeightBytes(const int8_t* from) : Bytes(load_words(from)) {}
};

struct RowBytes : Bytes {
  explicit LDALIGN_INLINE RowBytes(const int8_t* q) : Bytes(word(q) - U32{}) {}
  static LDALIGN_INLINE I32 start(const Quantised&) { return I32{}; }
  LDALIGN_INLINE void multiply_add(const WeightBytes& weights, I32& sum) const {
    sum += add_pairs(even, weights.even) + add_pairs(odd, weights.odd);
  }

 private:
  static LDALIGN_INLINE uint32_t word(const int8_t* q) {
    uint32_t bytes;
    __builtin_memcpy(&bytes, q, sizeof bytes);
    return bytes;
  }
};
#endif

// R rows against one panel, all sums in registers.
template <class T, int R>
LDALIGN_INLINE void int8_block(const int8_t* q, int64_t ldq, const Quantised* groups, const int8_t* panel, Ahead ahead,
                               int64_t K, const float* scales, int64_t columns, T* y, int64_t ldy) {
  constexpr int V = kPanel / kLanes;
  const int64_t ldg = K / kGroup;
  F32 total[R][V] = {};
  for (int64_t k = 0; k < K; k += kGroup, ++groups, scales += kPanel) {
    I32 sum[R][V];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[r][v] = RowBytes::start(groups[r * ldg]);
    }
    for (int word = 0; word < kGroup / 4; ++word, q += 4, panel += kPanel * 4) {
      ahead.fetch();
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        const WeightBytes right(panel + v * kLanes * 4);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) RowBytes(q + r * ldq).multiply_add(right, sum[r][v]);
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const F32 scale = load(scales + v * kLanes, Whole{});
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        total[r][v] += unfused(__builtin_convertvector(sum[r][v], F32) * (scale * groups[r * ldg].scale));
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store_left(y + r * ldy + v * kLanes, total[r][v], columns - v * kLanes);
  }
}

template <class T>
void packed_product_int8(const int8_t* q, int64_t ldq, const Quantised* groups, int64_t rows, const int8_t* packed,
                         const float* scales, int64_t K, int64_t N, int64_t first, int64_t last, T* y, int64_t ldy) {
  constexpr int kRows = kLanes == 16 ? 6 : 1;  // with a panel's columns, twice, what the registers hold
  const int64_t ldg = K / kGroup;
  by_blocks<kRows>(rows, packed, K, first, last,
                   [&](auto R, int64_t row, int64_t panel, Ahead ahead, const int8_t* values) LDALIGN_LAMBDA {
                     const int64_t column = panel * kPanel;
                     int8_block<T, R>(q + row * ldq, ldq, groups + row * ldg, values, ahead, K, scales + column * ldg,
                                      N - column, y + row * ldy + column, ldy);
                   });
}

}  // namespace ldalign::cpu::LDALIGN_ISA
