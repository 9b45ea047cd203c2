// CUDA adapter of the dct family: the plan, memory through torch, the current stream.
#include "common/cuda_device.h"
#include "dct/launch.h"
#include "torch/cuda_adapter.h"
#include "torch/dct_problem.h"

namespace freqrank::torch_adapter {

namespace {

Tensor dct_cuda(const Tensor& x, Sizes dims, std::optional<Sizes> lengths, std::optional<Sizes> sizes,
                std::int64_t type, std::int64_t norm, std::int64_t in_ends, std::int64_t out_ends) {
  const std::int32_t device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const dct::Problem problem = dct_problem(x, dims, lengths, sizes, type, norm, in_ends, out_ends);
  const dct::DevicePlan plan = dct::plan_device(problem, gpu_limits(device));
  Tensor out = torch::stable::new_empty(x, problem.out_sizes);
  const Tensor workspace = torch::stable::new_empty(x, {static_cast<std::int64_t>(dct::workspace_bytes(plan))},
                                                    std::make_optional(ScalarType::Byte));
  dct::run(plan, {x.const_data_ptr(), out.mutable_data_ptr()}, workspace.mutable_data_ptr(), current_stream(device));
  return out;
}

std::vector<std::int64_t> dct_limits(std::int64_t device) {
  const GpuLimits limits = gpu_limits(static_cast<int>(device));
  return {limits.sms, limits.shared_bytes, limits.shared_bytes_per_sm, limits.threads_per_sm};
}

std::string cuda_targets() { return freqrank::cuda_targets(); }

}  // namespace

}  // namespace freqrank::torch_adapter

STABLE_TORCH_LIBRARY_IMPL(freqrank, CUDA, m) { m.impl("dct", TORCH_BOX(&freqrank::torch_adapter::dct_cuda)); }

STABLE_TORCH_LIBRARY_IMPL(freqrank, CompositeExplicitAutograd, m) {
  m.impl("dct_cuda_limits", TORCH_BOX(&freqrank::torch_adapter::dct_limits));
  m.impl("cuda_targets", TORCH_BOX(&freqrank::torch_adapter::cuda_targets));
}
