// The Python module freqrank_simt: the executor, and the kernels of each family.

#include "bindings.h"

namespace py = pybind11;

namespace freqrank::simt_bindings {

namespace {

py::dict as_dict(const simt::Counts& counts) {
  py::dict out;
  for (const simt::CountName& count : simt::count_names()) out[count.name] = counts.*count.member;
  return out;
}

py::dict counters(const simt::Executor& executor) {
  py::dict kernels;
  for (const auto& [name, counts] : executor.counters()) {
    py::dict kernel = as_dict(counts.total), lines;
    kernel["launches"] = counts.launches;
    kernel["blocks"] = counts.blocks;
    kernel["threads"] = counts.threads;
    kernel["shared_bytes"] = counts.shared_bytes;
    for (const auto& [line, c] : counts.lines) lines[py::str(line)] = as_dict(c);
    kernel["lines"] = lines;
    kernels[py::str(name)] = kernel;
  }
  return kernels;
}

py::array_t<std::uint8_t> memory(std::uint64_t bytes) {
  auto* mapping = new simt::SparseMemory(std::max<std::uint64_t>(bytes, 1));
  const py::capsule owner(mapping, [](void* m) { delete static_cast<simt::SparseMemory*>(m); });
  return py::array_t<std::uint8_t>(static_cast<py::ssize_t>(bytes), static_cast<std::uint8_t*>(mapping->data()), owner);
}

}  // namespace

void bind_executor(py::module_& m) {
  py::register_exception<simt::Error>(m, "KernelError", PyExc_RuntimeError);
  m.def("memory", &memory, py::arg("bytes"),
        "Zero bytes, aligned as a GPU's allocations are. Only the pages that are touched exist, so any size will do.");
  py::class_<simt::Executor>(m, "Executor",
                             "Runs kernels on the host. `seed` decides every order that a GPU leaves open.")
      .def(py::init<std::uint64_t, int>(), py::arg("seed") = 0, py::arg("shared_limit") = 227 * 1024)
      .def(
          "expect_written",
          [](simt::Executor& executor, const py::array& array, bool by_next_launch) {
            if (!(array.flags() & py::array::c_style))
              throw py::value_error("expect_written: array must be contiguous");
            executor.expect_written(array.data(), array.size(), static_cast<int>(array.itemsize()), by_next_launch);
          },
          py::arg("array"), py::arg("by_next_launch") = false,
          "Demand that every element is written: by the end of the next launch, or by check_written().")
      .def("check_written", &simt::Executor::check_written)
      .def_property_readonly("counters", &counters, "What each kernel did, in total and by source line.")
      .def("reset_counters", &simt::Executor::reset_counters)
      .def("require_no_bank_conflicts", &simt::Executor::require_no_bank_conflicts, py::arg("kernel") = "")
      .def("require_full_sectors", &simt::Executor::require_full_sectors, py::arg("kernel") = "");
}

}  // namespace freqrank::simt_bindings

PYBIND11_MODULE(freqrank_simt, m) {
  m.doc() = "The CUDA kernels of freqrank, run by the host executor";
  freqrank::simt_bindings::bind_executor(m);
  freqrank::simt_bindings::bind_machine(m);
  freqrank::simt_bindings::bind_dct(m);
  freqrank::simt_bindings::bind_linear_attention(m);
  freqrank::simt_bindings::bind_linear_attention_fma(m);
  freqrank::simt_bindings::bind_gram(m);
  freqrank::simt_bindings::bind_cholesky(m);
}
