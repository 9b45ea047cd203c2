// Every op's schema. Sizes are SymInt so that one compiled graph serves many; the adapters take them as int64_t.
#include "common/isa.h"
#include "torch/adapter.h"

STABLE_TORCH_LIBRARY(freqrank, m) {
  // information about this build
  m.def("cpu_isa() -> str");

  // dct

  // linear_attention

  // whitening
}

static std::string cpu_isa() { return freqrank::isa_name(); }

STABLE_TORCH_LIBRARY_IMPL(freqrank, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&cpu_isa)); }
