#include "whitening/device/triangular_solve.h"
#include "whitening/device/triangular_update.h"

namespace freqrank::whitening::device {

template void enqueue_triangular_solve(TriangularSolveParams<float>, Index, simt::Queue&);
template void enqueue_triangular_solve(TriangularSolveParams<double>, Index, simt::Queue&);
template void enqueue_triangular_update(TriangularUpdateParams<float>, simt::Queue&);
template void enqueue_triangular_update(TriangularUpdateParams<double>, simt::Queue&);

}  // namespace freqrank::whitening::device
