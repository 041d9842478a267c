// The row kernels for AVX-512 with 8-bit and bfloat16 products, and AMX's tiles for bfloat16 products with packed weights. The pragma takes
// the place of per-file compiler flags, which setuptools lacks.
#include "kernels.h"

#if defined(__x86_64__) && defined(__linux__) && __has_include(<amxbf16intrin.h>)
#include <immintrin.h>  // before the pragma: these functions bring their own targets

#ifdef __clang__
#pragma clang attribute push(                                                                              \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,amx-tile,amx-bf16,fma"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,amx-tile,amx-bf16,fma")
#endif

#define LDALIGN_ISA amx_bf16
#define LDALIGN_VNNI
#define LDALIGN_BF16_DOT
#define LDALIGN_AMX
#define LDALIGN_VECTOR_BYTES 64
#include "row_kernels.h"

namespace ldalign::cpu {
const Table table_amx_bf16 = amx_bf16::make_table();
}

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
