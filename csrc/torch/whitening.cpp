// CPU adapters of the whitening family: check, allocate through torch, run.
#include <optional>
#include <tuple>

#include "torch/whitening_problem.h"

namespace freqrank::torch_adapter {

namespace {

Tensor workspace_for(const Tensor& like, std::int64_t bytes) {
  return torch::stable::new_empty(like, {bytes + 64}, ScalarType::Byte);
}

void* aligned(const Tensor& workspace) {
  const auto address = reinterpret_cast<std::uintptr_t>(workspace.data_ptr());
  return reinterpret_cast<void*>((address + 63) / 64 * 64);
}

void add_gram(const Tensor& out, bool accumulate, const Tensor& x, const std::optional<Tensor>& y,
              const std::optional<Tensor>& weight) {
  const GramCall call(out, accumulate, x, y, weight);
  const auto plan = wh::plan_gram({call.batch}, call.tokens, call.rows, call.columns, call.symmetric);
  const Tensor workspace = workspace_for(x, workspace_bytes(plan));
  run(plan, call.arguments, aligned(workspace), torch_parallel_for());
}

Tensor gram(const Tensor& x, const std::optional<Tensor>& y, const std::optional<Tensor>& weight) {
  const Tensor out = gram_result(x, y);
  add_gram(out, false, x, y, weight);
  return out;
}

void gram_(const Tensor& acc, const Tensor& x, const std::optional<Tensor>& y, const std::optional<Tensor>& weight) {
  add_gram(acc, true, x, y, weight);
}

std::tuple<Tensor, Tensor> cholesky_ex(const Tensor& a, bool upper) {
  CholeskyCall call(a, upper);
  const auto plan = wh::plan_cholesky({call.batch}, a.size(-1), dtype_of(a));
  const Tensor workspace = workspace_for(a, workspace_bytes(plan));
  run(plan, call.arguments, aligned(workspace), torch_parallel_for());
  return call.result(upper);
}

std::tuple<Tensor, Tensor, Tensor> cholesky_solve_ex(const Tensor& a, const Tensor& b, bool upper) {
  CholeskySolveCall call(a, b, upper);
  const auto plan = wh::plan_cholesky({call.factor.batch}, a.size(-1), dtype_of(a), b.size(-1));
  const Tensor workspace = workspace_for(a, workspace_bytes(plan));
  run(plan, call.factor.arguments, aligned(workspace), torch_parallel_for());
  return call.result(upper);
}

Tensor solve_triangular(const Tensor& a, const Tensor& b, bool upper, bool left, bool unitriangular) {
  const TriangularCall call(a, b, upper, left, unitriangular);
  const auto plan = wh::plan_triangular({call.batch}, call.n, call.columns, dtype_of(a));
  const Tensor workspace = workspace_for(a, workspace_bytes(plan));
  run(plan, call.arguments, aligned(workspace), torch_parallel_for());
  return call.x;
}

std::tuple<Tensor, Tensor, Tensor> whiten(const Tensor& gram, const std::optional<Tensor>& scale) {
  const WhitenCall call(gram, scale);
  const auto plan = wh::plan_cholesky({call.batch}, gram.size(-1), Dtype::float64);
  const Tensor workspace = workspace_for(gram, workspace_bytes(plan));
  run(plan, call.arguments, aligned(workspace), torch_parallel_for());
  return {call.factor, call.damping, call.info};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(freqrank, CPU, m) {
  m.impl("gram", TORCH_BOX(&gram));
  m.impl("gram_", TORCH_BOX(&gram_));
  m.impl("cholesky_ex", TORCH_BOX(&cholesky_ex));
  m.impl("cholesky_solve_ex", TORCH_BOX(&cholesky_solve_ex));
  m.impl("solve_triangular", TORCH_BOX(&solve_triangular));
  m.impl("whiten", TORCH_BOX(&whiten));
}

}  // namespace freqrank::torch_adapter
