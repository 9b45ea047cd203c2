#include "whitening/device/cholesky_panels.h"

namespace freqrank::whitening::device {

template void enqueue_cholesky_means(const CholeskySource&, simt::global<double>, simt::Queue&);

#define INSTANTIATE(T)                                                                                                \
  template void enqueue_cholesky_copy(const CholeskySource&, simt::global<const double>, simt::global<T>,             \
                                      const CholeskyProgress&, int, simt::Queue&);                                    \
  template void enqueue_cholesky_corner(simt::global<T>, Index, int, int, const CholeskyProgress&, simt::global<int>, \
                                        simt::Queue&);                                                                \
  template void enqueue_cholesky_finish(const CholeskySource&, const CholeskyResult<T>&, simt::global<const int>,     \
                                        simt::Queue&);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace freqrank::whitening::device
