#include <cstring>

#include "tile.h"

namespace vlrt {
namespace {

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

}  // namespace

const Level* find_level(const char* name) {
  const bool best = name == nullptr || std::strcmp(name, "auto") == 0;
#if defined(__x86_64__)
  if ((best || std::strcmp(name, kAvx512.name) == 0) && has_avx512()) return &kAvx512;
  if ((best || std::strcmp(name, kAvx2.name) == 0) && has_avx2()) return &kAvx2;
#endif
  return best || std::strcmp(name, kPlain.name) == 0 ? &kPlain : nullptr;
}

}  // namespace vlrt
