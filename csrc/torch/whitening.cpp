// CPU adapters of the whitening family: check, allocate through torch, run.
#include <optional>
#include <tuple>

#include "torch/whitening_problem.h"
#include "whitening/cholesky.h"
#include "whitening/triangular.h"

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
  STD_TORCH_CHECK(a.dim() >= 2 && a.size(-1) == a.size(-2), "freqrank::cholesky_ex: A must be square");
  const auto dtype = dtype_of(a);
  STD_TORCH_CHECK(dtype == Dtype::float32 || dtype == Dtype::float64,
                  "freqrank::cholesky_ex: A must be float32 or float64");
  const auto batch = sizes_of(a, 2);
  auto factor = torch::stable::new_empty(a, sizes_of(a, 0));
  const auto info = torch::stable::new_empty(a, batch, ScalarType::Int);
  const auto strides = strides_of(a);
  wh::CholeskyArguments arguments;
  arguments.a = view_of(a, strides);
  if (!upper) std::swap(arguments.a.row_stride, arguments.a.column_stride);
  arguments.factor = factor.data_ptr();
  arguments.info = static_cast<std::int32_t*>(info.data_ptr());
  const auto plan = wh::plan_cholesky({batch}, a.size(-1), dtype);
  const Tensor workspace = workspace_for(a, workspace_bytes(plan));
  run(plan, arguments, aligned(workspace), torch_parallel_for());
  return {upper ? factor : torch::stable::transpose(factor, -2, -1), info};
}

Tensor solve_triangular(const Tensor& a, const Tensor& b, bool upper, bool left, bool unitriangular) {
  STD_TORCH_CHECK(a.dim() >= 2 && a.size(-1) == a.size(-2), "freqrank::solve_triangular: A must be square");
  const auto batch = sizes_of(a, 2);
  check_batch(b, 2, batch);
  const auto dtype = dtype_of(a);
  STD_TORCH_CHECK((dtype == Dtype::float32 || dtype == Dtype::float64) && dtype_of(b) == dtype,
                  "freqrank::solve_triangular: A and B must both be float32 or float64");
  STD_TORCH_CHECK(b.size(left ? -2 : -1) == a.size(-1), "freqrank::solve_triangular: sizes do not match");
  const auto x = torch::stable::new_empty(b, sizes_of(b, 0));
  const auto a_strides = strides_of(a), b_strides = strides_of(b), x_strides = strides_of(x);
  wh::TriangularArguments arguments;
  arguments.a = view_of(a, a_strides);
  arguments.b = view_of(b, b_strides);
  arguments.x = view_of(x, x_strides);
  arguments.upper = upper;
  arguments.left = left;
  arguments.unit_triangular = unitriangular;
  const auto plan = wh::plan_triangular({batch}, a.size(-1), b.size(left ? -1 : -2), dtype);
  const Tensor workspace = workspace_for(a, workspace_bytes(plan));
  run(plan, arguments, aligned(workspace), torch_parallel_for());
  return x;
}

std::tuple<Tensor, Tensor, Tensor> whiten(const Tensor& gram, const std::optional<Tensor>& scale) {
  STD_TORCH_CHECK(gram.dim() >= 2 && gram.size(-1) == gram.size(-2), "freqrank::whiten: gram must be square");
  const auto dtype = dtype_of(gram);
  STD_TORCH_CHECK(dtype == Dtype::float32 || dtype == Dtype::float64,
                  "freqrank::whiten: gram must be float32 or float64");
  const auto batch = sizes_of(gram, 2);
  const auto factor = torch::stable::new_empty(gram, sizes_of(gram, 0), ScalarType::Double);
  const auto damping = torch::stable::new_empty(gram, batch, ScalarType::Double);
  const auto info = torch::stable::new_empty(gram, batch, ScalarType::Int);
  const auto strides = strides_of(gram);
  wh::WhitenArguments arguments;
  arguments.gram = view_of(gram, strides);
  std::optional<Tensor> scales;  // one for each matrix: small, so any strides are made plain
  if (scale) {
    check_batch(*scale, 0, batch);
    STD_TORCH_CHECK(scale->scalar_type() == ScalarType::Double, "freqrank::whiten: scale must be float64");
    scales = torch::stable::contiguous(*scale);
    arguments.scale = static_cast<const double*>(scales->data_ptr());
  }
  arguments.factor = static_cast<double*>(factor.data_ptr());
  arguments.damping = static_cast<double*>(damping.data_ptr());
  arguments.info = static_cast<std::int32_t*>(info.data_ptr());
  const auto plan = wh::plan_cholesky({batch}, gram.size(-1), Dtype::float64);
  const Tensor workspace = workspace_for(gram, workspace_bytes(plan));
  run(plan, arguments, aligned(workspace), torch_parallel_for());
  return {factor, damping, info};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(freqrank, CPU, m) {
  m.impl("gram", TORCH_BOX(&gram));
  m.impl("gram_", TORCH_BOX(&gram_));
  m.impl("cholesky_ex", TORCH_BOX(&cholesky_ex));
  m.impl("solve_triangular", TORCH_BOX(&solve_triangular));
  m.impl("whiten", TORCH_BOX(&whiten));
}

}  // namespace freqrank::torch_adapter
