// Binds the Gram kernels: plan, workspace and run of csrc/whitening/gram_device.h under the host executor.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "bindings.h"
#include "whitening/device/gram_launch.h"
#include "whitening/gram_device.h"

namespace py = pybind11;

namespace freqrank::simt_bindings {

namespace {

namespace wh = whitening;

wh::Dtype dtype_of(const py::array& x, const std::string& half) {
  switch (x.itemsize()) {
    case 8: return wh::Dtype::float64;
    case 4: return wh::Dtype::float32;
    case 2:
      if (half == "float16") return wh::Dtype::float16;
      if (half == "bfloat16") return wh::Dtype::bfloat16;
      throw py::value_error("half must be float16 or bfloat16; got " + half);
    default: throw py::value_error("x and y must have elements of 2, 4 or 8 bytes");
  }
}

struct Tensor {
  std::vector<std::int64_t> strides;
  wh::MatrixBatch view;
  void* data = nullptr;

  Tensor(const py::array& x, const std::string& half, int drop) {
    static char nothing[16];
    data = x.size() == 0 ? nothing : const_cast<void*>(x.data());
    for (py::ssize_t d = 0; d < x.ndim(); ++d) strides.push_back(x.strides(d) / x.itemsize());
    if (drop < 2) return;
    view.data = data;
    view.dtype = dtype_of(x, half);
    view.row_stride = strides[strides.size() - 2], view.column_stride = strides.back();
    view.batch_strides = strides.data();
  }
};

wh::GramDevicePlan plan_of(const py::array& x, const std::optional<py::array>& y, bool weighted, bool accumulate,
                           const std::string& half, const py::dict& given) {
  wh::GramDeviceProblem p;
  for (py::ssize_t d = 0; d + 2 < x.ndim(); ++d) p.batch.sizes.push_back(x.shape(d));
  p.tokens = x.shape(x.ndim() - 2), p.rows = x.shape(x.ndim() - 1);
  p.columns = y ? y->shape(y->ndim() - 1) : p.rows;
  p.x = dtype_of(x, half), p.y = y ? dtype_of(*y, half) : p.x;
  p.symmetric = !y, p.weighted = weighted, p.accumulate = accumulate;
  GpuLimits limits;
  if (given.contains("sms")) limits.sms = given["sms"].cast<int>();
  if (given.contains("float_per_double")) limits.float_per_double = given["float_per_double"].cast<int>();
  return wh::plan_gram_device(p, limits);
}

py::dict described(const wh::GramDevicePlan& plan) {
  py::dict d;
  d["text"] = wh::describe(plan);
  d["shape"] = plan.shape;
  d["integers"] = plan.integers;
  d["tiles"] = plan.tiles;
  d["splits"] = plan.splits;
  d["split_tokens"] = plan.split_tokens;
  d["blocks"] = plan.blocks;
  d["bytes"] = plan.bytes;
  d["shared_bytes"] = plan.shared_bytes;
  d["read_bytes"] = plan.read_bytes;
  d["write_bytes"] = plan.write_bytes;
  return d;
}

py::dict run(simt::Executor& executor, const py::array& out, const py::array& x, const std::optional<py::array>& y,
             const std::optional<py::array>& weight, bool accumulate, const std::string& half, const py::dict& limits) {
  const wh::GramDevicePlan plan = plan_of(x, y, weight.has_value(), accumulate, half, limits);
  const Tensor xs(x, half, 2), ys(y ? *y : x, half, 2), outs(out, half, 2);
  wh::GramArguments a;
  a.x = xs.view, a.y = ys.view, a.out = outs.view;
  a.accumulate = accumulate;
  std::optional<Tensor> weights;
  if (weight) {
    weights.emplace(*weight, half, 1);
    a.weight = static_cast<const double*>(weights->data);
    a.weight_stride = weights->strides.back();
    a.weight_batch_strides = weights->strides.data();
  }
  constexpr std::size_t align = 256;                                          // as a GPU's allocations are
  std::vector<std::uint8_t> memory(wh::workspace_bytes(plan) + align, 0xff);  // NaN
  const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
  simt::Queue queue(executor);
  wh::device::run_device_gram(plan, a, memory.data() + (align - address % align), queue);
  return described(plan);
}

}  // namespace

void bind_gram(py::module_& m) {
  m.def("gram", &run, py::arg("executor"), py::arg("out"), py::arg("x"), py::arg("y") = py::none(),
        py::arg("weight") = py::none(), py::arg("accumulate") = false, py::arg("half") = "bfloat16",
        py::arg("limits") = py::dict(), "X^T diag(weight) Y into `out`; the plan");
  m.def(
      "gram_plan",
      [](const py::array& x, const std::optional<py::array>& y, bool weighted, bool accumulate, const std::string& half,
         const py::dict& limits) { return described(plan_of(x, y, weighted, accumulate, half, limits)); },
      py::arg("x"), py::arg("y") = py::none(), py::arg("weighted") = false, py::arg("accumulate") = false,
      py::arg("half") = "bfloat16", py::arg("limits") = py::dict());
}

}  // namespace freqrank::simt_bindings
