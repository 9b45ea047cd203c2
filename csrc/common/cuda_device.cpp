#include "common/cuda_device.h"

#include <cuda_runtime_api.h>

#include <stdexcept>

namespace freqrank {

namespace {

std::string version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

std::string rebuild(const std::string& archs) {
  return "FREQRANK_CUDA=1 FREQRANK_CUDA_ARCHS=" + archs + " pip install . --no-build-isolation";
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, which, device);
  if (error != cudaSuccess) {
    cudaGetLastError();  // it is reported here
    throw std::runtime_error("GPU " + std::to_string(device) + ": " + explain_cuda_error(error));
  }
  return value;
}

}  // namespace

GpuLimits gpu_limits(int device) {
  GpuLimits limits;
  limits.sms = attribute(cudaDevAttrMultiProcessorCount, device);
  limits.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  limits.shared_bytes_per_sm = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  limits.threads_per_sm = attribute(cudaDevAttrMaxThreadsPerMultiProcessor, device);
  limits.float_per_double = attribute(cudaDevAttrSingleToDoublePrecisionPerfRatio, device);
  return limits;
}

const char* cuda_targets() { return FREQRANK_CUDA_TARGETS; }

std::string explain_cuda_error(int code) {
  const auto error = static_cast<cudaError_t>(code);
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorUnsupportedPtxVersion: {
      int device = 0;
      cudaDeviceProp properties{};
      if (cudaGetDevice(&device) != cudaSuccess || cudaGetDeviceProperties(&properties, device) != cudaSuccess) {
        cudaGetLastError();  // it must not surface in somebody else's next call
        break;
      }
      const std::string arch = std::to_string(properties.major) + std::to_string(properties.minor);
      return std::string("this build of freqrank holds GPU code for ") + cuda_targets() + ", which does not run on " +
             properties.name + " (compute capability " + std::to_string(properties.major) + "." +
             std::to_string(properties.minor) + "). Build it for this GPU: " + rebuild(arch);
    }
    case cudaErrorInsufficientDriver: {
      int driver = 0;
      cudaDriverGetVersion(&driver);
      if (driver == 0) return "no NVIDIA driver is loaded on this machine";
      return "freqrank was built with CUDA " + version(CUDART_VERSION) +
             ", and this machine's driver serves CUDA up to " + version(driver) +
             ". Update the driver, or build freqrank with a CUDA toolkit that it serves";
    }
    default: break;
  }
  return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

}  // namespace freqrank
