#pragma once
// Which instruction set the kernels compiled by freqrank_isa_sources() run on.

namespace freqrank {

enum class Isa { baseline, avx2, avx512 };

// The best instruction set of this processor, or the one that FREQRANK_ISA=baseline|avx2|avx512 in the environment
// caps it at. Read once.
Isa isa();
// Its name, as the dispatched code itself gives it.
const char* isa_name();

// FREQRANK_DISPATCH(f, args...) calls baseline::f, avx2::f or avx512::f, all declared in the enclosing namespace.
#if FREQRANK_X86
#define FREQRANK_DISPATCH(f, ...)                                        \
  (::freqrank::isa() == ::freqrank::Isa::avx512 ? avx512::f(__VA_ARGS__) \
   : ::freqrank::isa() == ::freqrank::Isa::avx2 ? avx2::f(__VA_ARGS__)   \
                                                : baseline::f(__VA_ARGS__))
#else
#define FREQRANK_DISPATCH(f, ...) (baseline::f(__VA_ARGS__))
#endif

namespace baseline {
const char* variant_name();
}
namespace avx2 {
const char* variant_name();
}
namespace avx512 {
const char* variant_name();
}

}  // namespace freqrank
