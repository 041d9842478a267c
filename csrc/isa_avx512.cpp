// The row kernels for AVX-512. The pragma takes the place of per-file compiler flags, which setuptools lacks.
#include "kernels.h"

#ifdef __x86_64__
#include <immintrin.h>  // before the pragma: these functions bring their own targets

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#endif

#define LDALIGN_ISA avx512
#define LDALIGN_VECTOR_BYTES 64
#include "row_kernels.h"

namespace ldalign::cpu {
const Table table_avx512 = avx512::make_table();
}

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
