// Compiled once for each instruction set: the smallest example of a dispatched function.
#define FREQRANK_STRING(x) #x
#define FREQRANK_NAME(x) FREQRANK_STRING(x)

namespace freqrank::FREQRANK_ISA {
const char* variant_name();
const char* variant_name() { return FREQRANK_NAME(FREQRANK_ISA); }
}  // namespace freqrank::FREQRANK_ISA
