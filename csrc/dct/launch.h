#pragma once
// The DCT on CUDA: runs the plans of dct/device.h. Needs no CUDA header.

#include "dct/device.h"

struct CUstream_st;  // *cudaStream_t

namespace freqrank::dct {

// Enqueues every step on `stream` of the current GPU and returns. Throws std::runtime_error, naming the kernel, if a
// launch fails. Allocates nothing and may be captured into a CUDA graph.
void run(const DevicePlan& plan, const DevicePointers& pointers, void* workspace, CUstream_st* stream);

}  // namespace freqrank::dct
