// The instruction sets of the row kernels: names only; the kernels are in kernels.h.
#pragma once

#include <string>
#include <vector>

namespace ldalign::cpu {

std::string isa();                // the one in use
std::vector<std::string> isas();  // those that were built and run here, best last
void set_isa(const std::string& name);

}  // namespace ldalign::cpu
