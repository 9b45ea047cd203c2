// The DCT on CUDA but for its kernels, which the other files of this folder compile, here and in tests/simt.
#include "dct/launch.h"

#include <stdexcept>

#include "dct/device/launch.h"
#include "simt/simt.h"

namespace freqrank::dct {

void run(const DevicePlan& plan, const DevicePointers& pointers, void* workspace, CUstream_st* stream) {
  simt::Queue queue(stream);
  device::run_device(plan, pointers, workspace, queue);
  if (!queue.ok()) throw std::runtime_error(queue.message());
}

}  // namespace freqrank::dct
