// The DCT on CUDA but for its kernels, which the other files of this folder compile, here and in tests/simt.
#include "dct/launch.h"

#include <stdexcept>

#include "common/cuda_device.h"
#include "dct/device/launch.h"
#include "simt/simt.h"

namespace freqrank::dct {

namespace {

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, which, device);
  if (error != cudaSuccess) {
    cudaGetLastError();  // it is reported here
    throw std::runtime_error("dct: GPU " + std::to_string(device) + ": " + explain_cuda_error(error));
  }
  return value;
}

}  // namespace

DeviceLimits device_limits(int device) {
  DeviceLimits limits;
  limits.sms = attribute(cudaDevAttrMultiProcessorCount, device);
  limits.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  limits.shared_bytes_per_sm = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  limits.threads_per_sm = attribute(cudaDevAttrMaxThreadsPerMultiProcessor, device);
  return limits;
}

void run(const DevicePlan& plan, const DevicePointers& pointers, void* workspace, CUstream_st* stream) {
  simt::Queue queue(stream);
  device::run_device(plan, pointers, workspace, queue);
  if (!queue.ok()) throw std::runtime_error(queue.message());
}

}  // namespace freqrank::dct
