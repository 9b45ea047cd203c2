#pragma once
// What the CUDA adapters need from torch beside adapter.h.

#include <torch/csrc/stable/accelerator.h>

#include <cstdint>

#include "torch/adapter.h"

struct CUstream_st;  // *cudaStream_t

namespace freqrank::torch_adapter {

inline CUstream_st* current_stream(std::int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<CUstream_st*>(stream);
}

}  // namespace freqrank::torch_adapter
