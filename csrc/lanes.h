// Vectors of floats, as wide as LDALIGN_VECTOR_BYTES, in the compiler's own vector extension: the operators +, *, <, ?:
// work lane by lane and become whatever instructions the file's target has. double is handled one value at a time
// (it is there for checks, not for speed): Lanes<double> is a plain double, and the same kernel code serves both.
//
// Include after kernels.h, with LDALIGN_ISA and LDALIGN_VECTOR_BYTES set. Everything is in a namespace of the
// instruction set: a function compiled for AVX-512 must never be taken by the linker for the portable one.
#pragma once

#include <type_traits>

#define LDALIGN_INLINE inline __attribute__((always_inline))
#define LDALIGN_LAMBDA __attribute__((always_inline))

namespace ldalign::cpu::LDALIGN_ISA {

constexpr int kLanes = LDALIGN_VECTOR_BYTES / 4;
typedef float F32 __attribute__((vector_size(LDALIGN_VECTOR_BYTES)));
typedef uint32_t U32 __attribute__((vector_size(LDALIGN_VECTOR_BYTES)));
typedef int32_t I32 __attribute__((vector_size(LDALIGN_VECTOR_BYTES)));
typedef uint16_t U16 __attribute__((vector_size(LDALIGN_VECTOR_BYTES / 2)));
typedef uint8_t U8 __attribute__((vector_size(LDALIGN_VECTOR_BYTES / 4)));

// Raw: a vector as it lies in memory. Lanes: the same values, wide.
template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  using Raw = F32;
  using Lanes = F32;
};
template <>
struct VectorOf<double> {
  using Raw = double;
  using Lanes = double;
};
template <>
struct VectorOf<bf16> {
  using Raw = U16;
  using Lanes = F32;
};
template <>
struct VectorOf<half> {
  using Raw = U16;
  using Lanes = F32;
};
template <class T>
using Raw = typename VectorOf<T>::Raw;
template <class T>
using Lanes = typename VectorOf<T>::Lanes;
template <class T>
constexpr int width = sizeof(Raw<T>) / sizeof(T);

LDALIGN_INLINE F32 splat(float value) { return value - F32{}; }
LDALIGN_INLINE double splat(double value) { return value; }

// ---- conversions: to float exactly; back rounded to nearest even, NaN kept

template <class T>
Lanes<T> widen(Raw<T> raw);
template <>
LDALIGN_INLINE F32 widen<float>(F32 raw) { return raw; }
template <>
LDALIGN_INLINE double widen<double>(double raw) { return raw; }
template <>
LDALIGN_INLINE F32 widen<bf16>(U16 raw) { return (F32)(__builtin_convertvector(raw, U32) << 16); }
// Both half conversions are those of github.com/Maratyszcza/FP16, made of multiplications by powers of two.
template <>
LDALIGN_INLINE F32 widen<half>(U16 raw) {
  const U32 word = __builtin_convertvector(raw, U32) << 16;
  const U32 sign = word & 0x80000000u, twice = word + word;
  const F32 normal = (F32)((twice >> 4) + (0xE0u << 23)) * 0x1p-112f;
  const F32 denormal = (F32)((twice >> 17) | (126u << 23)) - 0.5f;
  const U32 chosen = twice < (1u << 27) ? (U32)denormal : (U32)normal;
  return (F32)(sign | chosen);
}

template <class T>
Raw<T> narrow(Lanes<T> value);
template <>
LDALIGN_INLINE F32 narrow<float>(F32 value) { return value; }
template <>
LDALIGN_INLINE double narrow<double>(double value) { return value; }
template <>
LDALIGN_INLINE U16 narrow<bf16>(F32 value) {
  const U32 bits = (U32)value;
  const U32 rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
  return __builtin_convertvector((value == value ? rounded : bits | 0x00400000u) >> 16, U16);
}
template <>
LDALIGN_INLINE U16 narrow<half>(F32 value) {
  const U32 bits = (U32)value;
  const U32 sign = bits & 0x80000000u, twice = bits + bits;
  const F32 size = (F32)(bits & 0x7FFFFFFFu) * 0x1p+112f * 0x1p-110f;  // too large a value becomes infinite
  const U32 exponent = twice & 0xFF000000u, least = 0x71000000u - U32{};
  const U32 bias = exponent < least ? least : exponent;
  const U32 sum = (U32)((F32)((bias >> 1) + 0x07800000u) + size);  // the addition does the rounding
  const U32 rounded = ((sum >> 13) & 0x7C00u) + (sum & 0x0FFFu);
  return __builtin_convertvector((sign >> 16) | (value == value ? rounded : 0x7E00u - U32{}), U16);
}

// ---- memory: whole vectors, or the last few values of a row

struct Whole {};  // says at compile time that a vector's lanes are all there

LDALIGN_INLINE constexpr int lanes_of(Whole) { return kLanes; }
LDALIGN_INLINE constexpr int lanes_of(int count) { return count; }

template <class T>
LDALIGN_INLINE Lanes<T> load(const T* from, Whole, Wide<T> = 0) {
  Raw<T> raw;
  __builtin_memcpy(&raw, from, sizeof raw);
  return widen<T>(raw);
}

// The first `count` lanes; the others are `rest`.
template <class T>
LDALIGN_INLINE Lanes<T> load(const T* from, int count, Wide<T> rest = 0) {
#if LDALIGN_VECTOR_BYTES == 64
  // Through memory, a row's last vector can cost more than all the others.
  const __mmask16 mask = (__mmask16)((1u << count) - 1);
  if constexpr (std::is_same_v<T, float>) {
    return (F32)_mm512_mask_loadu_ps((__m512)splat(rest), mask, from);
  } else if constexpr (sizeof(T) == 2) {
    const F32 value = widen<T>((U16)_mm256_maskz_loadu_epi16(mask, from));
    return (F32)_mm512_mask_mov_ps((__m512)splat(rest), mask, (__m512)value);
  }
#endif
  T buffer[width<T>] = {};
  __builtin_memcpy(buffer, from, count * sizeof(T));
  Lanes<T> value = load(static_cast<const T*>(buffer), Whole{});
  if constexpr (width<T> > 1) {
    for (int lane = count; lane < width<T>; ++lane) value[lane] = rest;
  }
  return value;
}

template <class T>
LDALIGN_INLINE void store(T* to, Lanes<T> value, Whole) {
  const Raw<T> raw = narrow<T>(value);
  __builtin_memcpy(to, &raw, sizeof raw);
}

template <class T>
LDALIGN_INLINE void store(T* to, Lanes<T> value, int count) {
  const Raw<T> raw = narrow<T>(value);
#if LDALIGN_VECTOR_BYTES == 64
  const __mmask16 mask = (__mmask16)((1u << count) - 1);
  if constexpr (std::is_same_v<T, float>) return _mm512_mask_storeu_ps(to, mask, (__m512)raw);
  else if constexpr (sizeof(T) == 2) return _mm256_mask_storeu_epi16(to, mask, (__m256i)raw);
#endif
  __builtin_memcpy(to, &raw, count * sizeof(T));
}

// The first `left` lanes, which may be none, or more than there are.
template <class T>
LDALIGN_INLINE void store_left(T* to, Lanes<T> value, int64_t left) {
  if (left >= width<T>) store(to, value, Whole{});
  else if (left > 0) store(to, value, static_cast<int>(left));
}

template <class T>
LDALIGN_INLINE T round_to(Wide<T> value) {
  T rounded;
  store(&rounded, splat(value), 1);
  return rounded;
}

template <class T>
LDALIGN_INLINE Wide<T> value_of(T stored) {
  const Lanes<T> lanes = load(&stored, 1);
  if constexpr (width<T> > 1) return lanes[0];
  else return lanes;
}

// body(i, count) for every vector of n values: count is Whole{}, then the number of values left over.
template <class T, class Body>
LDALIGN_INLINE void sweep(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + width<T> <= n; i += width<T>) body(i, Whole{});
  if (i < n) body(i, static_cast<int>(n - i));
}

// ---- arithmetic

LDALIGN_INLINE double total(F32 value) {
  double sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += value[lane];
  return sum;
}
LDALIGN_INLINE double total(double value) { return value; }

// Passes over NaN in b.
template <class V>
LDALIGN_INLINE V larger(V a, V b) { return b > a ? b : a; }

LDALIGN_INLINE float largest_of(F32 value) {
  float most = value[0];
  for (int lane = 1; lane < kLanes; ++lane) most = value[lane] > most ? value[lane] : most;
  return most;
}
LDALIGN_INLINE double largest_of(double value) { return value; }

// e^x within 2 units in the last place (Cephes' polynomial): x = n ln 2 + r with |r| <= ln 2 / 2, then e^r 2^n.
// 0 below -87, infinite above 88.7, NaN stays.
LDALIGN_INLINE F32 exp(F32 x) {
  const F32 shifted = x * 1.44269504088896341f + 0x1.8p23f;  // adding 1.5 * 2^23 rounds: n is in the lowest bits
  const F32 n = shifted - 0x1.8p23f;
  const F32 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first exact in few bits
  F32 p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  F32 y = (F32)((U32)p + ((U32)shifted << 23));
  y = x < -87.0f ? F32{} : y;
  y = x > 88.72283f ? splat(__builtin_huge_valf()) : y;
  return x == x ? y : x;
}
LDALIGN_INLINE double exp(double x) { return __builtin_exp(x); }

}  // namespace ldalign::cpu::LDALIGN_ISA
