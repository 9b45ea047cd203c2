#pragma once
// The arithmetic, compiled once for each instruction set. Within one of them, vectors of every width do the same
// operations in the same order, fused where dct/arithmetic.h says so and nowhere else: the same bits whatever the
// number of rows or of threads.

#include "dct/dct.h"

namespace freqrank::dct {

struct Work {
  const Pass* pass;
  const Row* row;
  const void* table;
  const void* in;
  void* out;
};

#define FREQRANK_DCT_KERNELS(isa)                                                                         \
  namespace isa {                                                                                         \
  /* Groups [begin, end) of a pass, one after another. */                                                 \
  void run_groups(const Work& work, std::int64_t begin, std::int64_t end, void* scratch);                 \
  /* An FFT in place, re and im of length stages.n each; other_* is scratch of the same size. */          \
  void smooth_double(const Stages& stages, const double* table, double* re, double* im, double* other_re, \
                     double* other_im);                                                                   \
  }
FREQRANK_DCT_KERNELS(baseline)
FREQRANK_DCT_KERNELS(avx2)
FREQRANK_DCT_KERNELS(avx512)
#undef FREQRANK_DCT_KERNELS

}  // namespace freqrank::dct
