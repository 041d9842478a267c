// What team.cpp uses of ATen: as many threads as a test asks for.
#pragma once

#include <cstdlib>

namespace at {
inline int threads = 1;
inline int get_num_threads() { return threads; }
inline bool in_parallel_region() { return false; }
}  // namespace at

#define TORCH_INTERNAL_ASSERT(condition, message) \
  if (!(condition)) std::abort()
