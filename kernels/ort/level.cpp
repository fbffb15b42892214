#include <cstring>

#include "tile.h"

#if defined(VLRT_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace vlrt {
namespace {

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

#if defined(VLRT_AMX)
// Whether the processor has the tile unit, the system saves its registers, and lets this process use them.
bool permitted_amx() {
  constexpr unsigned kXsave = 1u << 27, kTile = 1u << 24, kAmxBf16 = 1u << 22, kAvx512Bf16 = 1u << 5;
  unsigned a, b, c, d;
  if (!has_avx512() || !__get_cpuid(1, &a, &b, &c, &d) || !(c & kXsave)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kTile | kAmxBf16)) != (kTile | kAmxBf16)) return false;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & kAvx512Bf16)) return false;
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned kTileState = 3u << 17;  // XTILECFG and XTILEDATA
  if ((low & kTileState) != kTileState) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM of asm/prctl.h, Linux 5.16
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

const Level* amx() {
  static const Level level = [] {
    Level made = kAvx512;
    made.name = "amx";
    made.bf16 = &kAmxBf16;
    return made;
  }();
  return has_amx_bf16() ? &level : nullptr;
}
#else
const Level* amx() { return nullptr; }
#endif

}  // namespace

bool has_amx_bf16() {
#if defined(VLRT_AMX)
  static const bool permitted = permitted_amx();
  return permitted;
#else
  return false;
#endif
}

const Level* find_level(const char* name) {
  const bool any = std::strcmp(name, "auto-bf16") == 0, best = any || std::strcmp(name, "auto") == 0;
  if ((any || std::strcmp(name, "amx") == 0) && amx() != nullptr) return amx();
#if defined(__x86_64__)
  if ((best || std::strcmp(name, kAvx512.name) == 0) && has_avx512()) return &kAvx512;
  if ((best || std::strcmp(name, kAvx2.name) == 0) && has_avx2()) return &kAvx2;
#endif
  return best || std::strcmp(name, kPlain.name) == 0 ? &kPlain : nullptr;
}

}  // namespace vlrt
