// The row kernels for AVX2 with FMA. The pragma takes the place of per-file compiler flags, which setuptools lacks.
#include "kernels.h"

#ifdef __x86_64__
#include <immintrin.h>  // before the pragma: these functions bring their own targets

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define LDALIGN_ISA avx2
#define LDALIGN_VECTOR_BYTES 32
#include "row_kernels.h"

namespace ldalign::cpu {
const Table table_avx2 = avx2::make_table();
}

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
