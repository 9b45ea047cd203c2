#pragma once
// Gram matrices on CUDA: runs the plans of whitening/gram_device.h. Needs no CUDA header.

#include "whitening/gram_device.h"

struct CUstream_st;  // *cudaStream_t

namespace freqrank::whitening {

// Enqueues its launches on `stream` of the current GPU and returns. Throws std::runtime_error, naming the kernel, if
// one fails. Allocates nothing and may be captured into a CUDA graph. `workspace` must be aligned to 16 bytes.
void run_gram(const GramDevicePlan& plan, const GramArguments& arguments, void* workspace, CUstream_st* stream);

}  // namespace freqrank::whitening
