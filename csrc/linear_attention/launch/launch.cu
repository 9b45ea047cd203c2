// Linear attention on CUDA but for its kernels, which the other files of this folder compile, here and in tests/simt.
#include "linear_attention/launch.h"

#include <stdexcept>

#include "linear_attention/device/launch.h"
#include "simt/simt.h"

namespace freqrank::linear_attention {

namespace device {
template <class Queue>
void enqueue_step(const Sizes& sizes, const StepArguments& args, Queue& queue);
}

namespace {

void check(const simt::Queue& queue) {
  if (!queue.ok()) throw std::runtime_error(queue.message());
}

}  // namespace

void run_forward(const DevicePlan& plan, const Inputs& in, const ForwardOutputs& out, const Normalizer& normalizer,
                 void* workspace, CUstream_st* stream) {
  simt::Queue queue(stream);
  device::run_device_forward(plan, in, out, normalizer, workspace, queue);
  check(queue);
}

void run_backward(const DevicePlan& plan, const Inputs& in, const BackwardArguments& args, const Normalizer& normalizer,
                  void* workspace, CUstream_st* stream) {
  simt::Queue queue(stream);
  device::run_device_backward(plan, in, args, normalizer, workspace, queue);
  check(queue);
}

void run_step(const Sizes& sizes, const StepArguments& args, CUstream_st* stream) {
  simt::Queue queue(stream);
  device::enqueue_step(sizes, args, queue);
  check(queue);
}

}  // namespace freqrank::linear_attention
