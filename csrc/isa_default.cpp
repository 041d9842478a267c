// The row kernels for any machine: 128-bit vectors (SSE2, NEON, or whatever the compiler makes of them).
#include "kernels.h"

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#define LDALIGN_ISA portable
#define LDALIGN_VECTOR_BYTES 16
#include "row_kernels.h"

namespace ldalign::cpu {
const Table table_default = portable::make_table();
}
