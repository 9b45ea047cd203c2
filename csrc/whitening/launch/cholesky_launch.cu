// Cholesky factors and triangular solves on CUDA but for their kernels, which the other files of this folder compile,
// here and in tests/simt.
#include <stdexcept>

#include "simt/simt.h"
#include "whitening/cholesky_cuda.h"
#include "whitening/device/cholesky_launch.h"

namespace freqrank::whitening {

namespace {

void check(const simt::Queue& queue) {
  if (!queue.ok()) throw std::runtime_error(queue.message());
}

}  // namespace

void run(const DeviceCholeskyPlan& plan, const CholeskyArguments& arguments, void* workspace, CUstream_st* stream) {
  simt::Queue queue(stream);
  device::run_device_cholesky(plan, arguments, workspace, queue);
  check(queue);
}

void run(const DeviceCholeskyPlan& plan, const WhitenArguments& arguments, void* workspace, CUstream_st* stream) {
  simt::Queue queue(stream);
  device::run_device_whiten(plan, arguments, workspace, queue);
  check(queue);
}

void run(const DeviceTriangularPlan& plan, const TriangularArguments& arguments, CUstream_st* stream) {
  simt::Queue queue(stream);
  device::run_device_triangular(plan, arguments, queue);
  check(queue);
}

}  // namespace freqrank::whitening
