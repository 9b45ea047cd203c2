#pragma once
// Linear attention on CUDA: runs the plans of linear_attention/device.h. Needs no CUDA header.

#include "linear_attention/device.h"

struct CUstream_st;  // *cudaStream_t

namespace freqrank::linear_attention {

// Each enqueues its launches on `stream` of the current GPU and returns. Throws std::runtime_error, naming the kernel,
// if one fails. Allocates nothing and may be captured into a CUDA graph. cu_seqlens is read on the GPU.
void run_forward(const DevicePlan& plan, const Inputs& in, const ForwardOutputs& out, const Normalizer& normalizer,
                 void* workspace, CUstream_st* stream);
void run_backward(const DevicePlan& plan, const Inputs& in, const BackwardArguments& args, const Normalizer& normalizer,
                  void* workspace, CUstream_st* stream);
void run_step(const Sizes& sizes, const StepArguments& args, CUstream_st* stream);

}  // namespace freqrank::linear_attention
