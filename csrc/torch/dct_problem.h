#pragma once
// The arguments of the dct schemas as the family's Problem; for the adapters of both devices.

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>
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

using Sizes = std::vector<std::int64_t>;

// The result is contiguous, so its sizes give its strides.
inline dct::Problem dct_problem(Sizes in_sizes, Sizes in_strides, ScalarType dtype, const Sizes& dims,
                                const std::optional<Sizes>& lengths, const std::optional<Sizes>& sizes,
                                std::int64_t type, std::int64_t norm, std::int64_t in_ends, std::int64_t out_ends) {
  dct::Problem problem;
  problem.dtype = dct_dtype(dtype);
  problem.type = static_cast<int>(type);
  problem.norm = static_cast<int>(norm);
  problem.in_ends = static_cast<int>(in_ends);
  problem.out_ends = static_cast<int>(out_ends);
  problem.in_sizes = std::move(in_sizes);
  problem.in_strides = std::move(in_strides);
  problem.out_sizes = problem.in_sizes;
  const std::size_t ndim = problem.in_sizes.size();
  STD_TORCH_CHECK(!lengths || lengths->size() == dims.size(), "freqrank::dct: one length a transformed dimension");
  STD_TORCH_CHECK(!sizes || sizes->size() == dims.size(), "freqrank::dct: one size a transformed dimension");
  for (std::size_t i = 0; i < dims.size(); ++i) {
    STD_TORCH_CHECK(dims[i] >= 0 && static_cast<std::size_t>(dims[i]) < ndim, "freqrank::dct: dims out of range");
    const auto d = static_cast<std::size_t>(dims[i]);
    problem.dims.push_back(static_cast<int>(dims[i]));
    problem.lengths.push_back(lengths ? (*lengths)[i] : problem.in_sizes[d]);
    problem.out_sizes[d] = sizes ? (*sizes)[i] : problem.lengths.back();
  }
  problem.threads = static_cast<int>(torch::stable::get_num_threads());
  problem.out_strides.resize(ndim);
  std::int64_t stride = 1;
  for (std::size_t d = ndim; d-- > 0;) {
    problem.out_strides[d] = stride;
    stride *= std::max<std::int64_t>(1, problem.out_sizes[d]);  // as torch counts where a size is 0
  }
  return problem;
}

inline dct::Problem dct_problem(const Tensor& x, const Sizes& dims, const std::optional<Sizes>& lengths,
                                const std::optional<Sizes>& sizes, std::int64_t type, std::int64_t norm,
                                std::int64_t in_ends, std::int64_t out_ends) {
  std::int64_t *in_sizes = nullptr, *in_strides = nullptr;  // borrowed
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(x.get(), &in_sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(x.get(), &in_strides));
  return dct_problem(Sizes(in_sizes, in_sizes + x.dim()), Sizes(in_strides, in_strides + x.dim()), x.scalar_type(),
                     dims, lengths, sizes, type, norm, in_ends, out_ends);
}

}  // namespace freqrank::torch_adapter
