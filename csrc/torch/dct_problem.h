#pragma once
// The arguments of the dct schemas as the family's Problem; for the adapters of both devices.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "dct/dct.h"
#include "torch/adapter.h"

namespace freqrank::torch_adapter {

inline dct::Dtype dct_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half: return dct::Dtype::float16;
    case ScalarType::BFloat16: return dct::Dtype::bfloat16;
    case ScalarType::Float: return dct::Dtype::float32;
    case ScalarType::Double: return dct::Dtype::float64;
    default: STD_TORCH_CHECK(false, "freqrank::dct: x must have dtype float16, bfloat16, float32 or float64");
  }
}

// The result is contiguous, so its sizes give its strides.
inline dct::Problem dct_problem(const std::vector<std::int64_t>& in_sizes, const std::vector<std::int64_t>& in_strides,
                                ScalarType dtype, const std::vector<std::int64_t>& dims,
                                const std::vector<std::int64_t>& lengths, const std::vector<std::int64_t>& sizes,
                                std::int64_t type, std::int64_t norm, std::int64_t in_ends, std::int64_t out_ends) {
  dct::Problem problem;
  problem.dtype = dct_dtype(dtype);
  problem.type = static_cast<int>(type);
  problem.norm = static_cast<int>(norm);
  problem.in_ends = static_cast<int>(in_ends);
  problem.out_ends = static_cast<int>(out_ends);
  problem.in_sizes = in_sizes;
  problem.in_strides = in_strides;
  problem.out_sizes = in_sizes;
  const auto ndim = static_cast<std::int64_t>(in_sizes.size());
  STD_TORCH_CHECK(dims.size() == sizes.size(), "freqrank::dct: one size a transformed dimension");
  for (std::size_t i = 0; i < dims.size(); ++i) {
    STD_TORCH_CHECK(dims[i] >= 0 && dims[i] < ndim, "freqrank::dct: dims out of range");
    problem.dims.push_back(static_cast<int>(dims[i]));
    problem.out_sizes[static_cast<std::size_t>(dims[i])] = sizes[i];
  }
  problem.lengths = lengths;
  problem.threads = static_cast<int>(torch::stable::get_num_threads());
  problem.out_strides.resize(in_sizes.size());
  std::int64_t stride = 1;
  for (std::size_t d = in_sizes.size(); d-- > 0;) {
    problem.out_strides[d] = stride;
    stride *= std::max<std::int64_t>(1, problem.out_sizes[d]);  // as torch counts where a size is 0
  }
  return problem;
}

inline dct::Problem dct_problem(const Tensor& x, const std::vector<std::int64_t>& dims,
                                const std::vector<std::int64_t>& lengths, const std::vector<std::int64_t>& sizes,
                                std::int64_t type, std::int64_t norm, std::int64_t in_ends, std::int64_t out_ends) {
  std::vector<std::int64_t> in_sizes, in_strides;
  for (std::int64_t d = 0; d < x.dim(); ++d) {
    in_sizes.push_back(x.size(d));
    in_strides.push_back(x.stride(d));
  }
  return dct_problem(in_sizes, in_strides, x.scalar_type(), dims, lengths, sizes, type, norm, in_ends, out_ends);
}

}  // namespace freqrank::torch_adapter
