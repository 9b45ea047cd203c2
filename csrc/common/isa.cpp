#include "common/isa.h"

#include <cstdlib>
#include <cstring>

namespace freqrank {

namespace {

Isa detect() {
#if FREQRANK_X86
  Isa best = Isa::baseline;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    best = Isa::avx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      best = Isa::avx512;
    }
  }
  if (const char* cap = std::getenv("FREQRANK_ISA")) {
    if (std::strcmp(cap, "baseline") == 0) return Isa::baseline;
    if (std::strcmp(cap, "avx2") == 0 && best == Isa::avx512) return Isa::avx2;
  }
  return best;
#else
  return Isa::baseline;
#endif
}

}  // namespace

Isa isa() {
  static const Isa chosen = detect();
  return chosen;
}

const char* isa_name() { return FREQRANK_DISPATCH(variant_name); }

}  // namespace freqrank
