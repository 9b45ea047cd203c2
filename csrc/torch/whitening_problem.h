#pragma once
// What the CPU and the CUDA adapters of the whitening family have in common: views, checks, a call of gram.

#include <optional>
#include <vector>

#include "torch/adapter.h"
#include "whitening/gram.h"

namespace freqrank::torch_adapter {

namespace wh = freqrank::whitening;
using wh::Dtype;

inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half: return Dtype::float16;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Double: return Dtype::float64;
    default: STD_TORCH_CHECK(false, "freqrank: a floating-point tensor was expected");
  }
  return Dtype::float64;
}

inline std::vector<std::int64_t> sizes_of(const Tensor& tensor, std::int64_t drop) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end() - drop};
}

inline void check_batch(const Tensor& tensor, std::int64_t drop, const std::vector<std::int64_t>& batch) {
  STD_TORCH_CHECK(tensor.dim() >= drop && sizes_of(tensor, drop) == batch, "freqrank: batch dimensions differ");
}

// `strides` is the tensor's own and must outlive the view.
inline wh::MatrixBatch view_of(const Tensor& tensor, const std::vector<std::int64_t>& strides) {
  wh::MatrixBatch view;
  view.data = tensor.data_ptr();
  view.dtype = dtype_of(tensor);
  view.column_stride = strides[strides.size() - 1];
  view.row_stride = strides[strides.size() - 2];
  view.batch_strides = strides.data();
  return view;
}

inline std::vector<std::int64_t> strides_of(const Tensor& tensor) {
  const auto strides = tensor.strides();
  return {strides.begin(), strides.end()};
}

// The operands of gram, checked, as the family takes them. The views point into it.
struct GramCall {
  std::vector<std::int64_t> batch, x_strides, y_strides, out_strides, weight_strides;
  std::int64_t tokens, rows, columns;
  bool symmetric;
  wh::GramArguments arguments;

  GramCall(const Tensor& out, bool accumulate, const Tensor& x, const std::optional<Tensor>& y,
           const std::optional<Tensor>& weight) {
    STD_TORCH_CHECK(x.dim() >= 2 && out.dim() >= 2 && out.scalar_type() == ScalarType::Double,
                    "freqrank::gram: bad arguments");
    const Tensor& other = y ? *y : x;
    batch = sizes_of(x, 2);
    check_batch(other, 2, batch);
    check_batch(out, 2, batch);
    tokens = x.size(-2), rows = x.size(-1), columns = other.size(-1);
    symmetric = !y;
    STD_TORCH_CHECK(other.size(-2) == tokens && out.size(-2) == rows && out.size(-1) == columns,
                    "freqrank::gram: sizes do not match");
    x_strides = strides_of(x), y_strides = strides_of(other), out_strides = strides_of(out);
    arguments.x = view_of(x, x_strides);
    arguments.y = view_of(other, y_strides);
    arguments.out = view_of(out, out_strides);
    arguments.accumulate = accumulate;
    if (!weight) return;
    check_batch(*weight, 1, batch);
    STD_TORCH_CHECK(weight->scalar_type() == ScalarType::Double && weight->size(-1) == tokens,
                    "freqrank::gram: weight does not match x");
    weight_strides = strides_of(*weight);
    arguments.weight = static_cast<const double*>(weight->data_ptr());
    arguments.weight_stride = weight_strides.back();
    arguments.weight_batch_strides = weight_strides.data();
  }
  GramCall(const GramCall&) = delete;
  GramCall& operator=(const GramCall&) = delete;
};

// An uninitialised result of gram.
inline Tensor gram_result(const Tensor& x, const std::optional<Tensor>& y) {
  STD_TORCH_CHECK(x.dim() >= 2 && (!y || y->dim() >= 2), "freqrank::gram: x and y must be matrices");
  auto sizes = sizes_of(x, 2);
  sizes.push_back(x.size(-1));
  sizes.push_back((y ? *y : x).size(-1));
  return torch::stable::new_empty(x, sizes, ScalarType::Double);
}

}  // namespace freqrank::torch_adapter
