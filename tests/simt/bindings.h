#pragma once
// What the bindings of every family share. numpy arrays reach kernels as views over their whole span.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "simt/simt.h"

namespace freqrank::simt_bindings {

void bind_executor(pybind11::module_& m);

}  // namespace freqrank::simt_bindings
