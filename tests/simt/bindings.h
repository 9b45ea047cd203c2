#pragma once
// What the bindings of every family share.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "simt/simt.h"

namespace freqrank::simt_bindings {

void bind_executor(pybind11::module_& m);
void bind_machine(pybind11::module_& m);
void bind_dct(pybind11::module_& m);
void bind_linear_attention(pybind11::module_& m);
void bind_linear_attention_fma(pybind11::module_& m);
void bind_gram(pybind11::module_& m);
void bind_cholesky(pybind11::module_& m);

}  // namespace freqrank::simt_bindings
