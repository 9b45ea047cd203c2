#pragma once
// What the CPU and the CUDA adapters of the whitening family have in common: views, checks, and each op's call with its
// operands as the family takes them. Views point into the call.

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "torch/adapter.h"
#include "whitening/cholesky.h"
#include "whitening/gram.h"
#include "whitening/triangular.h"

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

inline void check_solver_dtype(const Tensor& x, const char* what) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double, "freqrank::", what,
                  " must be float32 or float64");
}

struct CholeskyCall {
  std::vector<std::int64_t> batch, strides;
  Tensor factor, info;
  wh::CholeskyArguments arguments;

  CholeskyCall(const Tensor& a, bool upper) {
    STD_TORCH_CHECK(a.dim() >= 2 && a.size(-1) == a.size(-2), "freqrank::cholesky_ex: A must be square");
    check_solver_dtype(a, "cholesky_ex: A");
    batch = sizes_of(a, 2), strides = strides_of(a);
    factor = torch::stable::new_empty(a, sizes_of(a, 0));
    info = torch::stable::new_empty(a, batch, ScalarType::Int);
    arguments.a = view_of(a, strides);
    if (!upper) std::swap(arguments.a.row_stride, arguments.a.column_stride);
    arguments.factor = factor.data_ptr();
    arguments.info = static_cast<std::int32_t*>(info.data_ptr());
  }
  CholeskyCall(const CholeskyCall&) = delete;
  CholeskyCall& operator=(const CholeskyCall&) = delete;

  std::tuple<Tensor, Tensor> result(bool upper) {
    return {upper ? factor : torch::stable::transpose(factor, -2, -1), info};
  }
};

// A factorisation, and what is solved with it.
struct CholeskySolveCall {
  CholeskyCall factor;
  std::vector<std::int64_t> b_strides, x_strides;
  Tensor x;

  CholeskySolveCall(const Tensor& a, const Tensor& b, bool upper) : factor(a, upper) {
    check_batch(b, 2, factor.batch);
    STD_TORCH_CHECK(b.scalar_type() == a.scalar_type(), "freqrank::cholesky_solve_ex: B must have the dtype of A");
    STD_TORCH_CHECK(b.size(-2) == a.size(-1), "freqrank::cholesky_solve_ex: sizes do not match");
    x = torch::stable::new_empty(b, sizes_of(b, 0));
    b_strides = strides_of(b), x_strides = strides_of(x);
    factor.arguments.b = view_of(b, b_strides);
    factor.arguments.x = view_of(x, x_strides);
  }

  std::tuple<Tensor, Tensor, Tensor> result(bool upper) {
    const auto [L, info] = factor.result(upper);
    return {x, L, info};
  }
};

struct WhitenCall {
  std::vector<std::int64_t> batch, strides;
  std::optional<Tensor> scales;  // one for each matrix: small, so any strides are made plain
  Tensor factor, damping, info;
  wh::WhitenArguments arguments;

  WhitenCall(const Tensor& gram, const std::optional<Tensor>& scale) {
    STD_TORCH_CHECK(gram.dim() >= 2 && gram.size(-1) == gram.size(-2), "freqrank::whiten: gram must be square");
    check_solver_dtype(gram, "whiten: gram");
    batch = sizes_of(gram, 2), strides = strides_of(gram);
    factor = torch::stable::new_empty(gram, sizes_of(gram, 0), ScalarType::Double);
    damping = torch::stable::new_empty(gram, batch, ScalarType::Double);
    info = torch::stable::new_empty(gram, batch, ScalarType::Int);
    arguments.gram = view_of(gram, strides);
    if (scale) {
      check_batch(*scale, 0, batch);
      STD_TORCH_CHECK(scale->scalar_type() == ScalarType::Double, "freqrank::whiten: scale must be float64");
      scales = torch::stable::contiguous(*scale);
      arguments.scale = static_cast<const double*>(scales->data_ptr());
    }
    arguments.factor = static_cast<double*>(factor.data_ptr());
    arguments.damping = static_cast<double*>(damping.data_ptr());
    arguments.info = static_cast<std::int32_t*>(info.data_ptr());
  }
  WhitenCall(const WhitenCall&) = delete;
  WhitenCall& operator=(const WhitenCall&) = delete;
};

struct TriangularCall {
  std::vector<std::int64_t> batch, a_strides, b_strides, x_strides;
  std::int64_t n, columns;
  Tensor x;
  wh::TriangularArguments arguments;

  TriangularCall(const Tensor& a, const Tensor& b, bool upper, bool left, bool unitriangular) {
    STD_TORCH_CHECK(a.dim() >= 2 && a.size(-1) == a.size(-2), "freqrank::solve_triangular: A must be square");
    batch = sizes_of(a, 2);
    check_batch(b, 2, batch);
    check_solver_dtype(a, "solve_triangular: A");
    STD_TORCH_CHECK(b.scalar_type() == a.scalar_type(), "freqrank::solve_triangular: B must have the dtype of A");
    n = a.size(-1), columns = b.size(left ? -1 : -2);
    STD_TORCH_CHECK(b.size(left ? -2 : -1) == n, "freqrank::solve_triangular: sizes do not match");
    x = torch::stable::new_empty(b, sizes_of(b, 0));
    a_strides = strides_of(a), b_strides = strides_of(b), x_strides = strides_of(x);
    arguments.a = view_of(a, a_strides);
    arguments.b = view_of(b, b_strides);
    arguments.x = view_of(x, x_strides);
    arguments.upper = upper;
    arguments.left = left;
    arguments.unit_triangular = unitriangular;
  }
  TriangularCall(const TriangularCall&) = delete;
  TriangularCall& operator=(const TriangularCall&) = delete;
};

}  // namespace freqrank::torch_adapter
