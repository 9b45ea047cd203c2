#pragma once
// Cholesky factors, the whitening ladder and triangular solves on CUDA: runs the plans of cholesky_device.h. Needs no
// CUDA header.

#include "whitening/cholesky_device.h"

struct CUstream_st;  // *cudaStream_t

namespace freqrank::whitening {

// Each enqueues its launches on `stream` of the current GPU and returns. Throws std::runtime_error, naming the kernel,
// if one fails. Allocates nothing and may be captured into a CUDA graph. `workspace` must be aligned to 8 bytes.
void run(const DeviceCholeskyPlan& plan, const CholeskyArguments& arguments, void* workspace, CUstream_st* stream);
void run(const DeviceCholeskyPlan& plan, const WhitenArguments& arguments, void* workspace, CUstream_st* stream);
void run(const DeviceTriangularPlan& plan, const TriangularArguments& arguments, CUstream_st* stream);

}  // namespace freqrank::whitening
