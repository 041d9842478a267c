// The row kernels for AVX-512 with its products of 8-bit integers and of bfloat16 pairs. The pragma takes the place of
// per-file compiler flags, which setuptools lacks.
#include "kernels.h"

#ifdef __x86_64__
#include <immintrin.h>  // before the pragma: these functions bring their own targets

#ifdef __clang__
#pragma clang attribute push(                                                                   \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,fma"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,fma")
#endif

#define LDALIGN_ISA avx512_bf16
#define LDALIGN_VNNI
#define LDALIGN_BF16_DOT
#define LDALIGN_VECTOR_BYTES 64
#include "row_kernels.h"

namespace ldalign::cpu {
const Table table_avx512_bf16 = avx512_bf16::make_table();
}

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
