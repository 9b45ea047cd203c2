// One of the executor's own test kernels, so that pytest sees what the executor gives.

#include "bindings.h"
#include "machine_kernels.h"

namespace py = pybind11;

namespace freqrank::simt_bindings {

void bind_machine(py::module_& m) {
  m.def(
      "test_transpose",
      [](simt::Executor& executor, const py::array_t<float, py::array::c_style>& x,
         py::array_t<float, py::array::c_style> y, bool padded) {
        simt::Queue queue(executor);
        queue.launch<machine_tests::Transpose>(
            {1, 256, 33 * 32 * 4}, {queue.view(x.data(), 0, x.size()), queue.view(y.mutable_data(), 0, y.size()),
                                    padded ? machine_tests::Fault::none : machine_tests::Fault::no_padding});
      },
      py::arg("executor"), py::arg("x"), py::arg("y").noconvert(), py::arg("padded") = true);
}

}  // namespace freqrank::simt_bindings
