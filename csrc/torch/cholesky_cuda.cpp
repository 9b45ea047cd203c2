// CUDA adapters of Cholesky factors, whitening and triangular solves: check, allocate through torch, run on the current
// stream.
#include "whitening/cholesky_cuda.h"
#include "common/cuda_device.h"
#include "torch/cuda_adapter.h"
#include "torch/whitening_problem.h"

namespace freqrank::torch_adapter {

namespace {

Tensor workspace_of(const Tensor& like, std::size_t bytes) {
  return torch::stable::new_empty(like, {static_cast<std::int64_t>(bytes)}, ScalarType::Byte);
}

// Memory of another device would be read as if it were this one's.
void check_device(const Tensor& x, const std::optional<Tensor>& other, const char* what) {
  STD_TORCH_CHECK(!other || (other->is_cuda() && other->get_device_index() == x.get_device_index()),
                  "freqrank::", what);
}

std::tuple<Tensor, Tensor> cholesky_ex_cuda(const Tensor& a, bool upper) {
  check_device(a, a, "cholesky_ex: A must be on a GPU");
  const std::int32_t device = a.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  CholeskyCall call(a, upper);
  const auto plan = wh::plan_device_cholesky({call.batch}, a.size(-1), dtype_of(a), false, gpu_limits(device));
  const Tensor workspace = workspace_of(a, wh::workspace_bytes(plan));
  wh::run(plan, call.arguments, workspace.mutable_data_ptr(), current_stream(device));
  return call.result(upper);
}

std::tuple<Tensor, Tensor, Tensor> cholesky_solve_ex_cuda(const Tensor& a, const Tensor& b, bool upper) {
  check_device(a, a, "cholesky_solve_ex: A must be on a GPU");
  check_device(a, b, "cholesky_solve_ex: B must be on the GPU of A");
  const std::int32_t device = a.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  CholeskySolveCall call(a, b, upper);
  const auto plan =
      wh::plan_device_cholesky({call.factor.batch}, a.size(-1), dtype_of(a), false, gpu_limits(device), b.size(-1));
  const Tensor workspace = workspace_of(a, wh::workspace_bytes(plan));
  wh::run(plan, call.factor.arguments, workspace.mutable_data_ptr(), current_stream(device));
  return call.result(upper);
}

Tensor solve_triangular_cuda(const Tensor& a, const Tensor& b, bool upper, bool left, bool unitriangular) {
  check_device(a, a, "solve_triangular: A must be on a GPU");
  check_device(a, b, "solve_triangular: B must be on the GPU of A");
  const std::int32_t device = a.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const TriangularCall call(a, b, upper, left, unitriangular);
  const auto plan = wh::plan_device_triangular({call.batch}, call.n, call.columns, dtype_of(a), gpu_limits(device));
  wh::run(plan, call.arguments, current_stream(device));
  return call.x;
}

std::tuple<Tensor, Tensor, Tensor> whiten_cuda(const Tensor& gram, const std::optional<Tensor>& scale) {
  check_device(gram, gram, "whiten: gram must be on a GPU");
  check_device(gram, scale, "whiten: scale must be on the GPU of gram");
  const std::int32_t device = gram.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const WhitenCall call(gram, scale);
  const auto plan = wh::plan_device_cholesky({call.batch}, gram.size(-1), Dtype::float64, true, gpu_limits(device));
  const Tensor workspace = workspace_of(gram, wh::workspace_bytes(plan));
  wh::run(plan, call.arguments, workspace.mutable_data_ptr(), current_stream(device));
  return {call.factor, call.damping, call.info};
}

}  // namespace

}  // namespace freqrank::torch_adapter

STABLE_TORCH_LIBRARY_IMPL(freqrank, CUDA, m) {
  m.impl("cholesky_ex", TORCH_BOX(&freqrank::torch_adapter::cholesky_ex_cuda));
  m.impl("cholesky_solve_ex", TORCH_BOX(&freqrank::torch_adapter::cholesky_solve_ex_cuda));
  m.impl("solve_triangular", TORCH_BOX(&freqrank::torch_adapter::solve_triangular_cuda));
  m.impl("whiten", TORCH_BOX(&freqrank::torch_adapter::whiten_cuda));
}
