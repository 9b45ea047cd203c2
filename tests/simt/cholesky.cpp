// Binds the Cholesky and triangular kernels: plans and runs of csrc/whitening/cholesky_device.h under the host
// executor.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "bindings.h"
#include "whitening/cholesky_device.h"
#include "whitening/device/cholesky_launch.h"

namespace py = pybind11;

namespace freqrank::simt_bindings {

namespace {

namespace wh = whitening;

GpuLimits limits_of(int shared_bytes) {
  GpuLimits limits;
  if (shared_bytes > 0) limits.shared_bytes = shared_bytes;
  return limits;
}

wh::Dtype dtype_of(const py::array& x) { return x.itemsize() == 8 ? wh::Dtype::float64 : wh::Dtype::float32; }

wh::BatchSizes batch_of(const py::array& x) { return {std::vector<std::int64_t>(x.shape(), x.shape() + x.ndim() - 2)}; }

// A batch of matrices, and its strides.
struct Matrices {
  std::vector<std::int64_t> strides;
  wh::MatrixBatch view;

  explicit Matrices(const py::array& x) {
    for (py::ssize_t d = 0; d < x.ndim(); ++d) strides.push_back(x.strides(d) / x.itemsize());
    view.data = const_cast<void*>(x.data());
    view.dtype = dtype_of(x);
    view.row_stride = strides[strides.size() - 2], view.column_stride = strides.back();
    view.batch_strides = strides.data();
  }
};

const char* name(wh::CholeskyKernel kernel) {
  switch (kernel) {
    case wh::CholeskyKernel::warp: return "warp";
    case wh::CholeskyKernel::block: return "block";
    case wh::CholeskyKernel::panels: return "panels";
  }
  return "?";
}

py::dict described(const wh::DeviceCholeskyPlan& plan) {
  py::dict d;
  d["text"] = wh::describe(plan);
  d["kernel"] = name(plan.kernel);
  d["rows"] = plan.rows;
  d["width"] = plan.width;
  d["launches"] = plan.launches;
  d["shared_bytes"] = plan.shared_bytes;
  d["bytes"] = plan.bytes;
  return d;
}

py::dict described(const wh::DeviceTriangularPlan& plan) {
  py::dict d;
  d["text"] = wh::describe(plan);
  d["rows"] = plan.rows;
  d["launches"] = plan.launches;
  d["shared_bytes"] = plan.shared_bytes;
  return d;
}

// Aligned as a GPU's allocations are, NaN.
struct Workspace {
  std::vector<std::uint64_t> memory;
  explicit Workspace(std::size_t bytes) : memory(bytes / 8 + 1, ~std::uint64_t{0}) {}
};

py::dict cholesky(simt::Executor& executor, const py::array& a, bool upper, py::array& factor,
                  py::array_t<std::int32_t>& info, int shared_bytes, const std::optional<py::array>& b,
                  const std::optional<py::array>& x) {
  Matrices from(a);
  if (!upper) std::swap(from.view.row_stride, from.view.column_stride);
  wh::CholeskyArguments args{from.view, factor.mutable_data(), info.mutable_data(), {}, {}};
  std::optional<Matrices> right, to;
  if (b) args.b = right.emplace(*b).view, args.x = to.emplace(*x).view;
  const auto plan = wh::plan_device_cholesky(batch_of(a), a.shape(a.ndim() - 1), dtype_of(a), false,
                                             limits_of(shared_bytes), b ? b->shape(b->ndim() - 1) : wh::kNoRightSides);
  Workspace workspace(wh::workspace_bytes(plan));
  simt::Queue queue(executor);
  wh::device::run_device_cholesky(plan, args, workspace.memory.data(), queue);
  return described(plan);
}

py::dict whiten(simt::Executor& executor, const py::array& gram, const py::object& scale, py::array_t<double>& factor,
                py::array_t<double>& damping, py::array_t<std::int32_t>& info, int shared_bytes) {
  const Matrices from(gram);
  const auto plan = wh::plan_device_cholesky(batch_of(gram), gram.shape(gram.ndim() - 1), wh::Dtype::float64, true,
                                             limits_of(shared_bytes));
  Workspace workspace(wh::workspace_bytes(plan));
  wh::WhitenArguments args;
  args.gram = from.view;
  if (!scale.is_none()) args.scale = scale.cast<py::array_t<double>>().data();
  args.factor = factor.mutable_data(), args.damping = damping.mutable_data(), args.info = info.mutable_data();
  simt::Queue queue(executor);
  wh::device::run_device_whiten(plan, args, workspace.memory.data(), queue);
  return described(plan);
}

py::dict solve_triangular(simt::Executor& executor, const py::array& a, const py::array& b, py::array& x, bool upper,
                          bool left, bool unit_triangular, int shared_bytes) {
  const Matrices from(a), right(b), to(x);
  const auto plan = wh::plan_device_triangular(batch_of(a), a.shape(a.ndim() - 1), b.shape(b.ndim() - (left ? 1 : 2)),
                                               dtype_of(a), limits_of(shared_bytes));
  simt::Queue queue(executor);
  wh::device::run_device_triangular(plan, {from.view, right.view, to.view, upper, left, unit_triangular}, queue);
  return described(plan);
}

}  // namespace

void bind_cholesky(py::module_& m) {
  const char* const limits = "shared_bytes: those that a block may use, or 0 for an H100's";
  m.def("cholesky", &cholesky, py::arg("executor"), py::arg("a"), py::arg("upper"), py::arg("factor"), py::arg("info"),
        py::arg("shared_bytes") = 0, py::arg("b") = py::none(), py::arg("x") = py::none(), limits);
  m.def("whiten", &whiten, py::arg("executor"), py::arg("gram"), py::arg("scale"), py::arg("factor"),
        py::arg("damping"), py::arg("info"), py::arg("shared_bytes") = 0, limits);
  m.def("solve_triangular", &solve_triangular, py::arg("executor"), py::arg("a"), py::arg("b"), py::arg("x"),
        py::arg("upper"), py::arg("left"), py::arg("unit_triangular"), py::arg("shared_bytes") = 0, limits);
  m.def(
      "cholesky_plan",
      [](std::vector<std::int64_t> batch, std::int64_t n, bool double_precision, bool ladder, int shared_bytes,
         std::int64_t right_sides) {
        return described(wh::plan_device_cholesky({std::move(batch)}, n,
                                                  double_precision ? wh::Dtype::float64 : wh::Dtype::float32, ladder,
                                                  limits_of(shared_bytes), right_sides));
      },
      py::arg("batch"), py::arg("n"), py::arg("double_precision"), py::arg("ladder") = false,
      py::arg("shared_bytes") = 0, py::arg("right_sides") = wh::kNoRightSides, limits);
  m.def(
      "triangular_plan",
      [](std::vector<std::int64_t> batch, std::int64_t n, std::int64_t columns, bool double_precision,
         int shared_bytes) {
        return described(wh::plan_device_triangular({std::move(batch)}, n, columns,
                                                    double_precision ? wh::Dtype::float64 : wh::Dtype::float32,
                                                    limits_of(shared_bytes)));
      },
      py::arg("batch"), py::arg("n"), py::arg("columns"), py::arg("double_precision"), py::arg("shared_bytes") = 0,
      limits);
}

}  // namespace freqrank::simt_bindings
