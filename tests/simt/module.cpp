// The Python module freqrank_simt: the executor, and the kernels of each family.

#include "bindings.h"

namespace py = pybind11;

namespace freqrank::simt_bindings {

void bind_executor(py::module_& m) {
  py::register_exception<simt::Error>(m, "KernelError", PyExc_RuntimeError);
  py::class_<simt::Executor>(m, "Executor", "Runs kernels on the host. Results must not depend on `seed`.")
      .def(py::init<std::uint64_t, int>(), py::arg("seed") = 0, py::arg("shared_limit") = 227 * 1024);
}

}  // namespace freqrank::simt_bindings

PYBIND11_MODULE(freqrank_simt, m) {
  m.doc() = "The CUDA kernels of freqrank, run by the host executor";
  freqrank::simt_bindings::bind_executor(m);
}
