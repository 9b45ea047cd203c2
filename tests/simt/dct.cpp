// Binds the DCT's kernels: plan, workspace and run of csrc/dct/device.h under the host executor.

#include <cstdint>
#include <vector>

#include "bindings.h"
#include "dct/device.h"
#include "dct/device/launch.h"

namespace py = pybind11;

namespace freqrank::simt_bindings {

namespace {

dct::Dtype dtype_of(const std::string& name) {
  if (name == "float16") return dct::Dtype::float16;
  if (name == "bfloat16") return dct::Dtype::bfloat16;
  if (name == "float32") return dct::Dtype::float32;
  if (name == "float64") return dct::Dtype::float64;
  throw py::value_error("dtype must be float16, bfloat16, float32 or float64; got " + name);
}

void set(const py::dict& values, const char* key, auto& field) {
  if (values.contains(key)) field = values[key].cast<std::remove_reference_t<decltype(field)>>();
}

dct::DeviceLimits limits_of(const py::dict& values) {
  dct::DeviceLimits limits;
  set(values, "sms", limits.sms);
  set(values, "shared_bytes", limits.shared_bytes);
  set(values, "shared_bytes_per_sm", limits.shared_bytes_per_sm);
  set(values, "threads_per_sm", limits.threads_per_sm);
  set(values, "largest_power_of_two", limits.largest_power_of_two);
  set(values, "largest_tile", limits.largest_tile);
  return limits;
}

dct::Problem problem_of(const py::array& x, const py::array& out, const std::string& dtype, std::vector<int> dims,
                        std::vector<std::int64_t> lengths, int type, int norm, int in_ends, int out_ends) {
  dct::Problem p;
  p.dtype = dtype_of(dtype);
  p.type = type;
  p.norm = norm;
  p.in_ends = in_ends;
  p.out_ends = out_ends;
  p.dims = std::move(dims);
  p.lengths = std::move(lengths);
  for (py::ssize_t d = 0; d < x.ndim(); ++d) {
    p.in_sizes.push_back(x.shape(d));
    p.in_strides.push_back(x.strides(d) / x.itemsize());
  }
  for (py::ssize_t d = 0; d < out.ndim(); ++d) {
    p.out_sizes.push_back(out.shape(d));
    p.out_strides.push_back(out.strides(d) / out.itemsize());
  }
  return p;
}

py::list steps_of(const dct::DevicePlan& plan) {
  py::list steps;
  for (const dct::Step& s : plan.steps) {
    py::dict d;
    d["algorithm"] = dct::name(s.algorithm);
    d["threads"] = s.threads;
    d["blocks"] = s.blocks;
    d["rows"] = s.rows;
    d["rows_per_block"] = s.rows_per_block;
    d["shared_bytes"] = s.shared_bytes;
    d["read_bytes"] = s.read_bytes;
    d["write_bytes"] = s.write_bytes;
    d["table_bytes"] = s.table_bytes;
    d["radices"] = std::vector<int>(s.axis[0].fft.radix, s.axis[0].fft.radix + s.axis[0].fft.stages);
    steps.append(d);
  }
  return steps;
}

// One table as the kernels make it.
py::array table_of(simt::Executor& executor, const std::string& kind, std::int64_t count, std::int64_t first,
                   std::int64_t step, std::int64_t period, bool wide) {
  dct::TableRun run;
  const bool chirp = kind == "chirp";
  run.kind = kind == "spectrum" ? dct::TableRun::spectrum : dct::TableRun::units;
  run.count = count;
  run.first = first;
  run.step = chirp ? 0 : step;
  run.square = chirp ? 1 : 0;
  run.inputs = run.outputs = period;
  run.period = chirp ? 2 * period : period;
  dct::Step fill;
  fill.wide = wide;
  fill.tables = {run};
  std::vector<double> scratch(static_cast<std::size_t>(run.scratch_bytes() / 8));
  py::array table(py::dtype(wide ? "complex128" : "complex64"), count);
  simt::Queue queue(executor);
  dct::device::enqueue_tables(fill, {nullptr, nullptr, table.mutable_data(), scratch.data()}, queue);
  return table;
}

}  // namespace

void bind_dct(py::module_& m) {
  m.def("dct_table", &table_of, "A table of roots of unity, a chirp or its spectrum", py::arg("executor"),
        py::arg("kind"), py::arg("count"), py::arg("first") = 0, py::arg("step") = 1, py::arg("period"),
        py::arg("wide"));
  m.def(
      "dct_plan",
      [](const py::array& x, const py::array& out, const std::string& dtype, std::vector<int> dims,
         std::vector<std::int64_t> lengths, int type, int norm, int in_ends, int out_ends, const py::dict& limits) {
        const dct::DevicePlan plan = dct::plan_device(
            problem_of(x, out, dtype, std::move(dims), std::move(lengths), type, norm, in_ends, out_ends),
            limits_of(limits));
        py::dict d;
        d["text"] = dct::describe(plan);
        d["workspace_bytes"] = dct::workspace_bytes(plan);
        d["steps"] = steps_of(plan);
        return d;
      },
      "How a GPU would transform x into out", py::arg("x"), py::arg("out"), py::arg("dtype"), py::arg("dims"),
      py::arg("lengths"), py::arg("type"), py::arg("norm") = 0, py::arg("in_ends") = 0, py::arg("out_ends") = 0,
      py::arg("limits") = py::dict());
  m.def(
      "dct",
      [](simt::Executor& executor, const py::array& x, py::array& out, const std::string& dtype, std::vector<int> dims,
         std::vector<std::int64_t> lengths, int type, int norm, int in_ends, int out_ends, const py::dict& limits) {
        const dct::DevicePlan plan = dct::plan_device(
            problem_of(x, out, dtype, std::move(dims), std::move(lengths), type, norm, in_ends, out_ends),
            limits_of(limits));
        std::vector<std::uint8_t> memory(dct::workspace_bytes(plan) + dct::kDeviceAlign, 0xff);  // NaN
        const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
        void* const workspace = memory.data() + (dct::kDeviceAlign - address % dct::kDeviceAlign);
        simt::Queue queue(executor);
        dct::device::run_device(plan, {x.data(), out.mutable_data()}, workspace, queue);
        return steps_of(plan);
      },
      "Transforms x into out; the steps of the plan that did it", py::arg("executor"), py::arg("x"), py::arg("out"),
      py::arg("dtype"), py::arg("dims"), py::arg("lengths"), py::arg("type"), py::arg("norm") = 0,
      py::arg("in_ends") = 0, py::arg("out_ends") = 0, py::arg("limits") = py::dict());
}

}  // namespace freqrank::simt_bindings
