#pragma once
// What the CUDA side of every family shares on the host: errors that a person can act on. Needs no CUDA header; `error`
// is a cudaError_t.

#include <string>

#include "common/gpu_limits.h"

namespace freqrank {

// Of a GPU, by its CUDA index. Throws std::runtime_error.
GpuLimits gpu_limits(int device);

// What a failed CUDA call means, and what to do about it where the build and the machine do not fit each other.
std::string explain_cuda_error(int error);

// Which GPU code this library holds, in the words of FREQRANK_CUDA_ARCHS.
const char* cuda_targets();

}  // namespace freqrank
