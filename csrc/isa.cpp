// Which instruction sets were built, and the choice among them at run time: the best one this machine has, or the one
// that LDALIGN_ISA names.
#include "isa.h"

#include <atomic>
#include <cstdlib>

#include <c10/util/Exception.h>

#include "kernels.h"

#if defined(__x86_64__) && defined(__linux__) && __has_include(<amxbf16intrin.h>)
#define LDALIGN_KNOWS_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ldalign::cpu {
namespace {

struct Isa {
  const char* name;
  bool runs_here;
  const Table* table;
};

#ifdef __x86_64__
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }

// Every processor with these has VNNI, too.
bool has_avx512_bf16() { return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16"); }
#endif

#ifdef LDALIGN_KNOWS_AMX
// Linux lends the tiles' registers to processes that ask for them.
bool has_amx() {
  unsigned a, b, c, d = 0;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;  // in edx
  constexpr long kRequest = 0x1023, kTileData = 18;       // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kBf16) && (d & kTile) &&
         syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#endif

// Best last.
const std::vector<Isa>& built() {
  static const std::vector<Isa> all = {
      {"default", true, &table_default},
#ifdef __x86_64__
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), &table_avx2},
      {"avx512", has_avx512(), &table_avx512},
      {"avx512_vnni", has_avx512_vnni(), &table_avx512_vnni},
      {"avx512_bf16", has_avx512_bf16(), &table_avx512_bf16},
#endif
#ifdef LDALIGN_KNOWS_AMX
      {"amx_bf16", has_avx512_bf16() && has_amx(), &table_amx_bf16},
#endif
  };
  return all;
}

const Isa* find(const std::string& name) {
  std::string here;
  for (const Isa& isa : built()) {
    if (!isa.runs_here) continue;
    if (name == isa.name) return &isa;
    here += std::string(here.empty() ? "" : ", ") + isa.name;
  }
  TORCH_CHECK_VALUE(false, "LDALIGN_ISA='", name, "' does not run here; choose one of ", here);
}

const Isa* first_choice() {
  const char* wanted = std::getenv("LDALIGN_ISA");
  if (wanted && *wanted) return find(wanted);
  const Isa* best = nullptr;
  for (const Isa& isa : built()) {
    if (isa.runs_here) best = &isa;
  }
  return best;
}

std::atomic<const Isa*>& chosen() {
  static std::atomic<const Isa*> isa{first_choice()};
  return isa;
}

}  // namespace

const Table& table() { return *chosen().load()->table; }

std::string isa() { return chosen().load()->name; }

void set_isa(const std::string& name) { chosen() = find(name); }

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Isa& isa : built()) {
    if (isa.runs_here) names.emplace_back(isa.name);
  }
  return names;
}

}  // namespace ldalign::cpu
