#pragma once
// Batched Cholesky factorisation, and the whitening ladder on top of it.

#include <cstdint>

#include "common/parallel.h"
#include "whitening/matrix.h"
#include "whitening/triangular.h"

namespace freqrank::whitening {

// The levels that whitening tries in turn: what is added to the diagonal, relative to it.
constexpr double kDampingLevels[] = {0, 1e-12, 1e-11, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6};
constexpr int kDampingLevelCount = static_cast<int>(sizeof kDampingLevels / sizeof *kDampingLevels);

struct CholeskyPlan {
  BatchSizes batch;
  std::int64_t n;
  Dtype dtype;         // of the arithmetic and of the factor: float32 or float64
  bool panels;         // a thread copies a matrix to its workspace, one alone or `lanes` side by side
  std::int64_t lanes;  // 1, or how many matrices are factored side by side
  bool share_matrix;   // the threads work on one matrix at a time rather than each on its own
  std::int64_t slots;  // how many pieces may be in work at a time
  std::int64_t right_sides = kNoRightSides;  // of A X = B for each matrix
  bool solve_panels = false;                 // they are solved with the panels that a factor is made in
  TriangularPlan solve = {};                 // where they are not: of U^T Y = B and of U X = Y
};

CholeskyPlan plan_cholesky(BatchSizes batch, std::int64_t n, Dtype dtype, std::int64_t right_sides = kNoRightSides);
std::int64_t workspace_bytes(const CholeskyPlan& plan);

// factor^T factor = A. The strides of `a` say where the *upper* triangle is: for a lower one pass them exchanged.
// `factor` is contiguous, row-major and upper triangular, zeros below; read by columns it is the lower factor. info[b]
// is 0, or the order m of the first leading minor of A[b] that is not positive definite (NaN counts as not): the first
// m - 1 rows and columns of the factor are then those of the leading minor's, and the rest of its upper triangle is
// A's. A matrix has the same factor, bit by bit, in any batch.
// With right-hand sides, also A x = b, [n, right_sides]; where info[b] > 0, x is NaN, as is the upper triangle of the
// factor. x overlaps none of the others.
struct CholeskyArguments {
  MatrixBatch a;
  void* factor = nullptr;
  std::int32_t* info = nullptr;
  MatrixBatch b = {}, x = {};
};

// What solves a plan's right-hand sides once there is the factor U: U^T x = b, then U x = x.
struct FactorSolves {
  std::vector<std::int64_t> strides;
  TriangularArguments each[2];

  FactorSolves(const BatchSizes& batch, std::int64_t n, const CholeskyArguments& arguments)
      : strides(batch.sizes.size()) {
    for (auto d = strides.size(), next = d; d-- > 0; next = d) {
      strides[d] = next == strides.size() ? n * n : strides[next] * batch.sizes[next];
    }
    const MatrixBatch rows{arguments.factor, arguments.a.dtype, n, 1, strides.data()};
    const MatrixBatch columns{arguments.factor, arguments.a.dtype, 1, n, strides.data()};
    each[0] = {columns, arguments.b, arguments.x, false, true, false};
    each[1] = {rows, arguments.x, arguments.x, true, true, false};
  }
  FactorSolves(const FactorSolves&) = delete;
  FactorSolves& operator=(const FactorSolves&) = delete;
};

// factor^T factor = scale G + damping diag(scale G), a zero on the diagonal damped by the mean of the diagonal. Tries
// damping 0, then 1e-12 to 1e-6 by tens, for each matrix until one succeeds. If none does, info[b] > 0, the upper
// triangle of the factor is NaN and damping[b] is the last level tried. The factor is float64, `gram` float32 or
// float64.
struct WhitenArguments {
  MatrixBatch gram;               // only the upper triangle is read
  const double* scale = nullptr;  // null (1), or one for each matrix, contiguous
  double* factor = nullptr;
  double* damping = nullptr;
  std::int32_t* info = nullptr;
};

// `workspace` must be aligned to 64 bytes.
void run(const CholeskyPlan& plan, const CholeskyArguments& arguments, void* workspace,
         const ParallelFor& parallel_for);
void run(const CholeskyPlan& plan, const WhitenArguments& arguments, void* workspace, const ParallelFor& parallel_for);

}  // namespace freqrank::whitening
