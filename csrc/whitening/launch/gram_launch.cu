// Gram matrices on CUDA but for their kernels, which the other files of this folder compile, here and in tests/simt.
#include "whitening/gram_launch.h"

#include <stdexcept>

#include "whitening/device/gram_launch.h"

namespace freqrank::whitening {

void run_gram(const GramDevicePlan& plan, const GramArguments& arguments, void* workspace, CUstream_st* stream) {
  simt::Queue queue(stream);
  device::run_device_gram(plan, arguments, workspace, queue);
  if (!queue.ok()) throw std::runtime_error(queue.message());
}

}  // namespace freqrank::whitening
