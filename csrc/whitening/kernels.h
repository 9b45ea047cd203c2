#pragma once
// The inner loops, compiled once for each instruction set. Everything else in this family is bookkeeping around them.

#include <cstdint>

#include "common/isa.h"
#include "whitening/matrix.h"

namespace freqrank::whitening {

// One instruction set's micro kernel covers a few rows by a few vectors of columns. Tiles are padded to what the widest
// of them needs, so that the plans are the same on every machine.
constexpr std::int64_t kRowPadding = 8, kColumnPadding = 48;
constexpr std::int64_t kTile = 192;  // rows and columns of a tile of a product: a multiple of both paddings
constexpr std::int64_t kDepth = 96;  // how much of the inner dimension is packed at a time
constexpr std::int64_t kBlock = 64;  // rows of a triangular block that is factored or solved in one piece

// Elements of the packing space that product() needs.
static constexpr std::int64_t packed_elements(std::int64_t rows, std::int64_t columns) {
  return kDepth * (round_up(rows, kRowPadding) + round_up(columns, kColumnPadding));
}

// A factor of a product: element (t, i) with t the inner dimension.
struct Operand {
  const void* data;
  Dtype dtype;
  std::int64_t depth_stride, lane_stride;
};

struct Product {
  Operand x, y;
  const double* weight;  // one for each t, or null
  std::int64_t weight_stride;
  std::int64_t depth, rows, columns;
  bool upper_only;  // x is y: what is below the diagonal is not wanted
};

// tile[i, j] += sign * sum over t of weight[t] x[t, i] y[t, j]. The tile is row-major with leading dimension `ld`,
// padded to kRowPadding rows and kColumnPadding columns, whose contents are arbitrary.
//
// factor: u[i, j] of the upper triangle of a rows x rows tile becomes the upper Cholesky factor. Returns 0, or the
// order of the first leading minor that is not positive definite (a NaN pivot included); that pivot is left in place.
//
// solve: x becomes u^-T x for upper triangular u (rows x rows), x having `columns` columns padded to kColumnPadding.
#define FREQRANK_WHITENING_KERNELS                                                                                     \
  void product(const Product& p, double sign, double* tile, std::int64_t ld, double* packed);                          \
  void product(const Product& p, float sign, float* tile, std::int64_t ld, float* packed);                             \
  std::int64_t factor(double* u, std::int64_t rows, std::int64_t ld);                                                  \
  std::int64_t factor(float* u, std::int64_t rows, std::int64_t ld);                                                   \
  void solve(const double* u, std::int64_t ldu, double* x, std::int64_t rows, std::int64_t columns, std::int64_t ldx); \
  void solve(const float* u, std::int64_t ldu, float* x, std::int64_t rows, std::int64_t columns, std::int64_t ldx);

namespace baseline {
FREQRANK_WHITENING_KERNELS
}
namespace avx2 {
FREQRANK_WHITENING_KERNELS
}
namespace avx512 {
FREQRANK_WHITENING_KERNELS
}

}  // namespace freqrank::whitening
