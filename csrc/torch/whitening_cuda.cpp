// CUDA adapters of the whitening family: check, allocate through torch, run on the current stream.
#include "common/cuda_device.h"
#include "torch/cuda_adapter.h"
#include "torch/whitening_problem.h"
#include "whitening/gram_launch.h"

namespace freqrank::torch_adapter {

namespace {

// Memory of another device would be read as if it were this one's.
void check_device(const Tensor& x, const std::optional<Tensor>& other, const char* name) {
  STD_TORCH_CHECK(!other || (other->is_cuda() && other->get_device_index() == x.get_device_index()),
                  "freqrank::gram: ", name, " must be on the GPU of x");
}

void add_gram(const Tensor& out, bool accumulate, const Tensor& x, const std::optional<Tensor>& y,
              const std::optional<Tensor>& weight) {
  check_device(x, x, "x"), check_device(x, y, "y"), check_device(x, weight, "weight"), check_device(x, out, "acc");
  const std::int32_t device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const GramCall call(out, accumulate, x, y, weight);
  wh::GramDeviceProblem problem;
  problem.batch = {call.batch};
  problem.tokens = call.tokens, problem.rows = call.rows, problem.columns = call.columns;
  problem.x = call.arguments.x.dtype, problem.y = call.arguments.y.dtype;
  problem.symmetric = call.symmetric;
  problem.weighted = weight.has_value(), problem.accumulate = accumulate;
  const wh::GramDevicePlan plan = wh::plan_gram_device(problem, gpu_limits(device));
  const Tensor workspace =
      torch::stable::new_empty(x, {static_cast<std::int64_t>(wh::workspace_bytes(plan))}, ScalarType::Byte);
  wh::run_gram(plan, call.arguments, workspace.mutable_data_ptr(), current_stream(device));
}

Tensor gram_cuda(const Tensor& x, const std::optional<Tensor>& y, const std::optional<Tensor>& weight) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor out = gram_result(x, y);
  add_gram(out, false, x, y, weight);
  return out;
}

void gram_cuda_(const Tensor& acc, const Tensor& x, const std::optional<Tensor>& y,
                const std::optional<Tensor>& weight) {
  add_gram(acc, true, x, y, weight);
}

}  // namespace

}  // namespace freqrank::torch_adapter

STABLE_TORCH_LIBRARY_IMPL(freqrank, CUDA, m) {
  m.impl("gram", TORCH_BOX(&freqrank::torch_adapter::gram_cuda));
  m.impl("gram_", TORCH_BOX(&freqrank::torch_adapter::gram_cuda_));
}
