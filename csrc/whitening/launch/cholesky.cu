#include "whitening/device/cholesky_block.h"
#include "whitening/device/cholesky_warp.h"

namespace freqrank::whitening::device {

#define INSTANTIATE(T)                                                                                                 \
  template void enqueue_cholesky_warp<T, 8>(const CholeskySource&, const CholeskyResult<T>&, const RightHandSides<T>&, \
                                            Index, simt::Queue&);                                                      \
  template void enqueue_cholesky_warp<T, 16>(const CholeskySource&, const CholeskyResult<T>&,                          \
                                             const RightHandSides<T>&, Index, simt::Queue&);                           \
  template void enqueue_cholesky_warp<T, 32>(const CholeskySource&, const CholeskyResult<T>&,                          \
                                             const RightHandSides<T>&, Index, simt::Queue&);                           \
  template void enqueue_cholesky_block(const CholeskySource&, const CholeskyResult<T>&, const RightHandSides<T>&,      \
                                       Index, int, simt::Queue&);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace freqrank::whitening::device
